"""Runs that are killed, run out of space or meet a NaN: what is left is good, and going on ends in the same figures."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

import children
import melayer
import small_runs
import toys
from melayer.errors import InputError, MelayerWarning, OutputError, TrainingError
from melayer.tuning import checkpoints, run_directory, trainers

JOBS = {
    "sft": {"save_steps": 2, "packing": False, "logging_steps": 3},
    "dpo": {"save_steps": 2},
    # Each batch of completions is used for two steps, so that a checkpoint falls between them.
    "grpo": {
        "save_steps": 3,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "num_iterations": 2,
    },
}


def job(method, out, *, lora=False, **options):
    rows = {"sft": small_runs.answers, "dpo": small_runs.pairs, "grpo": small_runs.problems}[method](10)
    more = {"rewards": [small_runs.n_even], "instruction": ""} if method == "grpo" else {}
    # Dropout draws random numbers in training, so that their state matters.
    lora = {"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]} if lora else False
    # Where a gradient is little more than rounding, Adam's step is as large as any other; this epsilon is above it.
    config = {"max_steps": 7, "adam_epsilon": 1e-3, **JOBS[method], **options.pop("config", {})}
    config = small_runs.small(**config)
    shared = {"out": out, "mask": small_runs.mask(), "lora": lora, "config": config, **more, **options}
    return getattr(melayer, method)(small_runs.model(), toys.tokenizer(), rows, **shared)


def killed_job(method: str, out: Path, lora: bool, when: str) -> None:
    """Run by the test below in a process of its own, which ends in SIGKILL."""

    def kill(*_, **__):
        children.kill()

    if when == "between":
        seen = trainers.RunCallback.on_log

        def on_log(self, args, state, control, **more):
            seen(self, args, state, control, **more)
            if state.global_step >= 5:
                kill()

        trainers.RunCallback.on_log = on_log
    elif when == "during":
        # Weights and optimiser are written by then, the rest is not; one checkpoint is there already.
        kind = {"sft": trainers.Supervised, "dpo": trainers.Preference, "grpo": trainers.Rewarded}[method]
        kept = kind._save_rng_state

        def save(self, directory):
            if self.state.global_step > 4:
                kill()
            kept(self, directory)

        kind._save_rng_state = save
    else:
        # All steps are done, and the last checkpoint is written; the result is not.
        checkpoints.publish_files = kill
    job(method, out, lora=lora)
    raise SystemExit("not killed")


@pytest.mark.parametrize(
    ("method", "lora", "when"),
    [
        ("sft", False, "between"),
        ("sft", True, "at the end"),
        ("dpo", False, "between"),
        ("dpo", True, "during"),
        ("dpo", False, "at the end"),
        ("grpo", True, "between"),
        ("grpo", False, "during"),
        ("grpo", True, "at the end"),
    ],
)
def test_killed_and_resumed_is_undisturbed(method, lora, when, tmp_path):
    out, said = tmp_path / "killed", tmp_path / "said"
    process = children.started(killed_job, method, out, lora, when, output=said)
    assert children.ended(process) == -signal.SIGKILL, children.errors_of(said).read_text()
    assert not (out / "config.json").exists()
    assert not (out / "adapter_config.json").exists()
    if when == "during":
        assert (out / checkpoints.STAGING).is_dir()
    undisturbed = job(method, tmp_path / "whole", lora=lora)
    resumed = job(method, out, lora=lora, resume=True)
    expected = 7 if when == "at the end" else 3 if method == "grpo" else 4
    assert resumed.resumed_from == expected
    assert resumed.steps == undisturbed.steps == 7
    assert not (out / checkpoints.STAGING).exists()
    key = "reward" if method == "grpo" else "loss"
    before, after = ([line for line in run.history() if key in line] for run in (undisturbed, resumed))
    assert [line["step"] for line in after] == [line["step"] for line in before]
    for left, right in zip(before, after, strict=True):
        for name in ("loss", "grad_norm", "reward", "kl", "entropy", "num_tokens", "rewards/margins"):
            assert (name in left) == (name in right)
            if left.get(name) is not None:
                assert left[name] == pytest.approx(right[name], abs=1e-5, rel=1e-5), (left["step"], name)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    left, right = (_weights(directory / name) for directory in (tmp_path / "whole", out))
    for key, value in left.items():
        torch.testing.assert_close(right[key], value, atol=1e-6, rtol=1e-5)


def _weights(path):
    from safetensors.torch import load_file

    return load_file(path)


def test_a_run_goes_on_only_as_it_began(tmp_path, monkeypatch):
    out = tmp_path / "o"
    with pytest.raises(InputError, match="There is no run in .* to go on with. Leave resume"):
        job("sft", out, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "publish_files", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            job("sft", out, config={"max_steps": 2})
    with pytest.raises(InputError, match="holds a run already, that was stopped; go on with --resume"):
        job("sft", out, config={"max_steps": 2})
    with pytest.raises(InputError, match="other settings: config.learning_rate 0.001 → 0.01. Go on with the same"):
        job("sft", out, config={"max_steps": 2, "learning_rate": 0.01}, resume=True)
    with pytest.raises(InputError, match="other settings: mask.by_layer, mask.rate 0.6 → 0.5. Go on"):
        job("sft", out, config={"max_steps": 2}, mask=small_runs.mask(rate=0.5), resume=True)
    job("sft", out, config={"max_steps": 2}, resume=True)
    with pytest.raises(InputError, match="The run in .* is finished. Load it with melayer.load"):
        job("sft", out, config={"max_steps": 2}, resume=True)
    with pytest.raises(InputError, match="holds a run already, and finished. Give another directory"):
        job("sft", out, config={"max_steps": 2})


def test_weights_alone_are_not_enough_to_go_on(tmp_path, monkeypatch):
    config = {"max_steps": 2, "save_only_model": True}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "publish_files", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            job("sft", tmp_path, config=config)
    with pytest.raises(InputError, match="holds weights only .save_only_model., so the run cannot go on from it"):
        job("sft", tmp_path, config=config, resume=True)


def test_a_nan_stops_before_it_reaches_a_weight(tmp_path, monkeypatch):
    monkeypatch.setattr(trainers.Supervised, "compute_loss", _nan_at(trainers.Supervised.compute_loss, 6))
    match = r"The loss of step 6 is nan, so training stopped; the checkpoint of step 4 is kept. Try a smaller learning"
    with pytest.raises(TrainingError, match=match):
        job("sft", tmp_path / "o", config={"logging_steps": 1})
    last = checkpoints.last(tmp_path / "o")
    assert last[0] == 4
    assert all(torch.isfinite(value).all() for value in _weights(last[1] / "model.safetensors").values())
    assert [line["step"] for line in run_directory.read_log(tmp_path / "o")] == [1, 2, 3, 4, 5]
    assert not (tmp_path / "o" / "config.json").exists()


def _nan_at(compute, step):
    def loss(self, *args, **options):
        found = compute(self, *args, **options)
        return found * float("nan") if self.state.global_step + 1 == step else found

    return loss


def test_weights_that_are_not_finite_are_never_a_checkpoint(tmp_path):
    # A gradient of infinity behind a finite loss: the weights are gone after the step, and the loss was fine.
    config = {"max_steps": 2, "learning_rate": 1e38, "optim": "sgd", "max_grad_norm": 0.0, "save_steps": 1}
    with pytest.raises(TrainingError, match=r"(After step 1 some weights are not finite|The loss of step \d is nan)"):
        job("sft", tmp_path / "o", config=config)
    last = checkpoints.last(tmp_path / "o")
    assert last is None or all(
        torch.isfinite(value).all() for value in _weights(last[1] / "model.safetensors").values()
    )


# --- what fails before anything is learnt, and after ----------------------------------------------------------------


def raising(at):
    """A reward that raises at its n-th call."""
    calls = []

    def reward(completions, **more):
        calls.append(1)
        if len(calls) >= at:
            raise LookupError("no such answer\nsecond line")
        return small_runs.n_even(completions, **more)

    return reward


def listing(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"lr_scheduler_kwargs": {"x": 1}}, "Training failed before its first step: .*unexpected keyword argument 'x'"),
        ({"optim_args": "x"}, "Training failed before its first step: "),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"x": 1}},
            "Unexpected keyword arguments: x",
        ),
        ({"loss_type": "x"}, "The trainer refuses this: Invalid `loss_type` x"),
        ({"eos_token": "nope"}, "The trainer refuses this: .*is not found in the vocabulary"),
        ({"learning_rate": -1.0}, "The option learning_rate is -1.0; expected 0 or more"),
    ],
)
def test_a_run_that_is_refused_leaves_nothing_and_the_corrected_one_runs_there(config, said, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / "notes.txt").write_text("mine")
    for out in (tmp_path / "a" / "b", there):
        before = listing(tmp_path)
        with pytest.raises(InputError, match=said) as refused:
            job("sft", out, config={**config, "max_steps": 1})
        assert "\n" not in str(refused.value)
        assert listing(tmp_path) == before
    assert job("sft", tmp_path / "a" / "b", config={"max_steps": 1}).steps == 1


def test_a_reward_that_raises_at_once_leaves_nothing(tmp_path):
    said = "Training failed before its first step: .*no such answer. Nothing was learnt, and nothing is kept"
    with pytest.raises(InputError, match=said):
        job("grpo", tmp_path / "o", rewards=[raising(1)])
    assert listing(tmp_path) == []
    assert job("grpo", tmp_path / "o", config={"max_steps": 1}).steps == 1


def test_a_reward_that_raises_later_keeps_what_was_learnt(tmp_path):
    out = tmp_path / "o"
    said = (
        "Training failed after step 4: .*no such answer. It stopped, and the checkpoint of step 3 is kept; go on with"
    )
    with pytest.raises(TrainingError, match=said):
        job("grpo", out, rewards=[raising(3)])
    assert checkpoints.last(out)[0] == 3
    assert json.loads((out / run_directory.FILE).read_text())["status"] == "running"


def numbers(text):
    return lambda completions, **_: text


@pytest.mark.parametrize("given", [None, "x", [1.0], ["a"] * 4, [[1]] * 4, [None, "x", 1, 2]])
def test_a_reward_that_returns_no_numbers_is_a_sentence(given, tmp_path):
    with pytest.raises((InputError, TrainingError)) as refused:
        job("grpo", tmp_path / "o", rewards=[numbers(given)])
    assert "\n" not in str(refused.value)


def stopped_after(out, step):
    """A run that was stopped after this step, with checkpoints."""

    def stop(done, *_):
        if done > step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job("sft", out, progress=stop, config={"logging_steps": 1})


@pytest.mark.parametrize(
    "name",
    ["melayer_state_0.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"],
)
def test_a_checkpoint_that_is_damaged_is_said_and_the_one_before_it_goes_on(name, tmp_path):
    out = tmp_path / "o"
    stopped_after(out, 4)
    file = out / "checkpoint-4" / name
    whole = file.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\0" * 64):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"checkpoint-4.* Remove (it|that directory|.*checkpoint-4)") as refused:
            job("sft", out, resume=True, config={"logging_steps": 1})
        assert "\n" not in str(refused.value)
    shutil.rmtree(out / "checkpoint-4")  # the advice
    assert job("sft", out, resume=True, config={"logging_steps": 1}).resumed_from == 2


STATES = {
    "a list": [], "empty": {}, "one more": {"x": 1}, "loss": {"loss": "1"},
    "loss of integers": {"loss": torch.tensor(1)},
    "losses": {"loss": torch.ones(2)}, "last_logged": {"last_logged": "4"}, "last_logged below 0": {"last_logged": -1},
    "tokens": {"tokens": True}, "metrics": {"metrics": [1]}, "metrics of numbers": {"metrics": {"a": 1}},
}  # fmt: skip


def test_a_state_of_another_form_is_refused(tmp_path):
    out = tmp_path / "o"
    stopped_after(out, 2)
    file = out / "checkpoint-2" / "melayer_state_0.pt"
    good = torch.load(file, weights_only=True)
    (out / "checkpoint-2" / "melayer_checkpoint.json").unlink()  # or the checksum would tell
    for changes in STATES.values():
        torch.save({**good, **changes} if changes and isinstance(changes, dict) else changes, file)
        with (
            pytest.warns(MelayerWarning, match="has no checksums"),
            pytest.raises(InputError, match="melayer_state_0.pt cannot be read: it"),
        ):
            job("sft", out, resume=True, config={"logging_steps": 1})


# --- no space -------------------------------------------------------------------------------------------------------


# Too little for the weights; and enough for these, but not for the optimiser.
@pytest.mark.parametrize("kilobytes", [200, 1500])
def test_no_space_for_a_checkpoint(kilobytes, room, tmp_path):
    out = tmp_path / "o"
    with pytest.raises(OutputError) as found:
        # The first checkpoint is whole: the disk fills up after it.
        job("sft", out, progress=lambda done, *_: room(kilobytes * 1000) if done == 3 else None)
    room(None)
    assert re.match(
        r"The checkpoint of step 4 cannot be written to .*: .* \(.* GB are free\)\. The checkpoint of step 2 is good; "
        "make room and go on with --resume.",
        str(found.value),
    )
    assert not (out / checkpoints.STAGING).exists()
    assert checkpoints.last(out)[0] == 2
    resumed = job("sft", out, resume=True)
    assert resumed.resumed_from == 2
    assert resumed.steps == 7


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Nothing can be written to .*file/o: Not a directory"):
        job("sft", tmp_path / "file" / "o")


# --- directories ----------------------------------------------------------------------------------------------------


def test_the_newest_whole_checkpoint(tmp_path):
    assert checkpoints.last(tmp_path / "missing") is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", checkpoints.STAGING):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert checkpoints.last(tmp_path) == (10, tmp_path / "checkpoint-10")


def test_publishing_replaces_a_directory_of_the_same_name(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "old").write_text("")
    staged = checkpoints.clear(tmp_path) / "checkpoint-1"
    staged.mkdir()
    (staged / "new").write_text("")
    checkpoints.publish(staged, tmp_path / "checkpoint-1")
    assert sorted(path.name for path in (tmp_path / "checkpoint-1").iterdir()) == [checkpoints.CHECKSUMS, "new"]
    assert list((tmp_path / checkpoints.STAGING).iterdir()) == []


def test_the_file_that_makes_it_a_model_comes_last(tmp_path, monkeypatch):
    staged = checkpoints.clear(tmp_path)
    for name in ("a", "config.json", "z"):
        (staged / name).write_text("")
    moved = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: moved.append(self.name) or replace(self, target))
    checkpoints.publish_files(staged, tmp_path, "config.json")
    assert sorted(moved[:2]) == ["a", "z"]
    assert moved[2] == "config.json"


def test_what_is_not_about_the_disk_goes_its_way(tmp_path):
    with pytest.raises(RuntimeError, match="mat1 and mat2"), checkpoints.writing("It", tmp_path):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_old_checkpoints_go_and_the_mask_comes_with_each(tmp_path):
    job("sft", tmp_path, config={"max_steps": 6, "save_steps": 1, "save_total_limit": 2})
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
    with pytest.warns(melayer.errors.MelayerWarning, match="is applied"):
        loaded = melayer.load(str(tmp_path / "checkpoint-6"))
    assert loaded.mask.by_layer == small_runs.mask().fixed(small_runs.model()).by_layer
