"""Options of the trainers: all of them by their names, and no others."""

from dataclasses import fields

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
