"""Options of the trainers: all of them by their names, and no others."""

import os
from dataclasses import fields
from pathlib import Path

import pytest

from melayer.errors import InputError
from melayer.tuning.config import check, config_class, read, recorded, resolve


def resolved(method, given, tmp_path, **options):
    shared = {"out": tmp_path, "seed": 0, "validates": False, "max_positions": 512, **options}
    return resolve(method, check(method, given, masked=True), **shared)


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_every_option_can_be_set_but_those_that_are_decided_elsewhere(method):
    refused = set()
    for item in fields(config_class(method)):
        if item.init:
            try:
                check(method, {item.name: None}, masked=False)
            except InputError:
                refused.add(item.name)
    decided = {"output_dir", "resume_from_checkpoint", "model_init_kwargs", "trust_remote_code", "do_train", "do_eval"}
    assert refused == decided | {"do_predict", "disable_tqdm"}


def test_names_that_are_none():
    with pytest.raises(InputError, match="sft has no option 'learning_rte'. Did you mean learning_rate?"):
        check("sft", {"learning_rte": 1}, masked=False)
    with pytest.raises(InputError, match="sft has no option 'qqqq'. See the fields of trl.SFTConfig"):
        check("sft", {"qqqq": 1}, masked=False)
    with pytest.raises(InputError, match="output_dir cannot be set in the config: it is `out`"):
        check("sft", {"output_dir": "x"}, masked=False)


def test_where_the_mask_cannot_be():
    for name in ("use_vllm", "use_transformers_paged", "use_transformers_continuous_batching", "torch_compile"):
        with pytest.raises(InputError, match=f"{name} does not go with a mask: .* Leave it out, or the mask"):
            check("grpo", {name: True}, masked=True)
        assert check("grpo", {name: True}, masked=False) == {name: True}
        assert check("grpo", {name: False}, masked=True) == {name: False}


def test_what_trl_ignores_is_refused():
    with pytest.raises(InputError, match="pads in DPO whatever padding_free says"):
        check("dpo", {"padding_free": True}, masked=False)


def test_numbers_that_yaml_reads_as_text(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 2e-5\nmax_steps: 3\n")
    assert check("sft", read(path), masked=False) == {"learning_rate": 2e-5, "max_steps": 3}
    with pytest.raises(InputError, match="The option learning_rate is 'much'; expected a number"):
        check("sft", {"learning_rate": "much"}, masked=False)


def test_files(tmp_path):
    path = tmp_path / "c.yaml"
    with pytest.raises(InputError, match="c.yaml cannot be read: .*Give a YAML file with --config"):
        read(path)
    for text, match in (("a: [1", "is not YAML: "), ("- 1\n", "is a list; expected lines of the form"), ("3", "int")):
        path.write_text(text)
        with pytest.raises(InputError, match=match):
            read(path)
    path.write_text("")
    assert read(path) == {}


def test_what_melayer_decides_and_what_it_leaves(tmp_path):
    config = resolved("sft", {}, tmp_path)
    assert config.max_length == 512
    assert config.report_to == []
    assert config.seed == 0
    assert resolved("sft", {"padding_free": True}, tmp_path).max_length is None
    assert resolved("sft", {"max_length": 64, "seed": 5}, tmp_path).max_length == 64
    assert resolved("sft", {"seed": 5}, tmp_path).seed == 5
    evaluating = resolved("sft", {}, tmp_path, validates=True)
    assert (str(evaluating.eval_strategy), evaluating.eval_on_start) == ("IntervalStrategy.STEPS", True)
    assert resolved("grpo", {"num_generations": 4}, tmp_path).per_device_train_batch_size == 4
    assert resolved("grpo", {}, tmp_path).beta == 0.04
    assert resolved("grpo", {"beta": 0.0}, tmp_path).beta == 0
    with pytest.raises(InputError, match="The trainer refuses its options: .*divisible by num_generations"):
        resolved("grpo", {"num_generations": 3, "per_device_train_batch_size": 4}, tmp_path)


def test_what_is_recorded_does_not_depend_on_the_place(tmp_path):
    left, right = (recorded(resolved("dpo", {}, tmp_path / name)) for name in ("a", "b"))
    assert left == right
    assert not any(str(tmp_path) in str(value) for value in left.values())
    assert "hub_token" not in left


WRONG = {
    "learning_rate": [-1, float("nan"), float("inf"), True, [1], "-1e-5"],
    "max_steps": [0, -5, "three", 1.5, 2**40, True],
    "per_device_train_batch_size": [0, -1, "2", 1.5],
    "gradient_accumulation_steps": [0, -1],
    "adam_beta1": [1, 2.0, -0.1],
    "adam_epsilon": [-1.0],
    "weight_decay": [-1.0],
    "max_grad_norm": [-1.0, "a"],
    "num_train_epochs": [0, -1.0, float("nan")],
    "save_steps": [0, -1],
    "save_total_limit": [0, -1],
    "seed": [-1, 2**64, "x", 0.5],
    "data_seed": [2**64, -1],
    "max_length": [0, -3, "a"],
    "dataloader_num_workers": [-1, "a"],
    "optim": [3],
    "run_name": [3, {"a": 1}],
    "gradient_checkpointing": ["yes", 1],
    "dataset_kwargs": [{"trust_remote_code": True}, {"a": {"custom_generate": "org/name"}}],
    "lr_scheduler_kwargs": ['{"trust_remote_code": true}'],
}


@pytest.mark.parametrize("name", WRONG)
def test_values_that_an_option_cannot_have(name):
    for value in WRONG[name]:
        with pytest.raises(InputError, match=f"The option {name} ") as refused:
            check("sft", {name: value}, masked=False)
        assert "expected" in str(refused.value) or "runs code of others" in str(refused.value)
        assert len(str(refused.value)) < 300


def test_values_that_it_can_have():
    right = {
        "learning_rate": 0, "max_steps": -1, "save_steps": 0.5, "optim": "sgd", "seed": 2**32 - 1, "warmup_steps": 0.1,
        "lr_scheduler_kwargs": {"num_cycles": 1}, "report_to": ["tensorboard"], "eval_steps": None, "fsdp_config": "{}",
    }  # fmt: skip
    assert check("sft", right, masked=False) == right


BOMB = "a: &a [1, 1]\n" + "".join(f"{x}: &{x} [*{y}, *{y}]\n" for x, y in zip("bcdefghij", "abcdefghi", strict=True))
FILES = {
    "a reference": (BOMB, r"refers to itself \(\*a\). Write each value out"),
    "a merge": ("a: &a {b: 1}\nc: {<<: *a}\n", "refers to itself"),
    "deep": ("a: " + "[" * 5000 + "]" * 5000, "is nested too deeply"),
    "deep JSON": ("{" + '"a": {' * 900 + "}" * 901, "is nested too deeply"),
    "a name twice": ("max_steps: 3\nlearning_rate: 1.0\nmax_steps: 4\n", "has the option 'max_steps' twice"),
    "a tab": ("a:\n\t- 1\n", "is not YAML"),
    "two documents": ("a: 1\n---\nb: 2\n", "is not YAML"),
    "a tag": ("a: !!python/object/apply:os.system [true]\n", "is not YAML"),
    "a date that there is not": ("a: 2024-02-31\n", "cannot be read: day is out of range for month"),
    "a list as a name": ("[1, 2]: 3\n", "is not YAML|expected lines"),
    "a number as a name": ("1: 2\n", "expected lines of the form"),
    "many bytes": ("# " + "x" * 300_000, "it has 300,002 bytes, and options take at most 262,144"),
    "a text": ("much", "is a str; expected lines of the form"),
    "a control character": ("a: \x01", "is not YAML"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_options(name, tmp_path):
    text, said = FILES[name]
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=said) as refused:
        read(tmp_path / "c.yaml")
    assert "\n" not in str(refused.value)


def test_places_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "latin.yaml", tmp_path / ("x" * 300), Path("a\0b")):
        with pytest.raises(InputError, match="cannot be read: .*Give a YAML file with --config"):
            read(path)


def test_lists_twice_the_same_are_no_names_twice(tmp_path):
    (tmp_path / "c.yaml").write_text("a: [x, x]\nb: {x: 1, y: 2}\nc: {x: 1}\nx: 3\n")
    assert read(tmp_path / "c.yaml")["x"] == 3


def test_dates_are_no_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text("max_steps: 2024-01-01\n")
    with pytest.raises(
        InputError, match=r"The option max_steps of sft is datetime.date\(2024, 1, 1\); expected a whole"
    ):
        check("sft", read(tmp_path / "c.yaml"), masked=False)
