"""Adapters come back as one model, on their base and no other, with their mask."""

import json
import shutil

import pytest
import torch
from peft import PeftModel

import melayer
import small_runs
import toys
from melayer.errors import MelayerWarning, ModelError
from melayer.interventions.mask import WeMask
from melayer.loading import adapters
from melayer.loading.checkpoint import weight_hashes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base and an adapter for it, trained under a mask that was made for the base."""
    directory = tmp_path_factory.mktemp("adapter")
    base = small_runs.model()
    base.save_pretrained(directory / "base")
    toys.tokenizer().save_pretrained(directory / "base")
    located = melayer.locate(base, toys.tokenizer(), texts=[toys.text(20, x_at=0)], name="base")
    mask = WeMask.from_located(located, rate=0.5)
    config = small_runs.small(max_steps=3, learning_rate=1e-2)
    melayer.sft(
        base, toys.tokenizer(), small_runs.answers(), out=directory / "out", mask=mask, lora=True, config=config,
        name=str(directory / "base"),
    )  # fmt: skip
    return directory


def test_an_adapter_is_the_model_that_peft_makes_of_it(trained):
    with pytest.warns(MelayerWarning) as said:
        model, tokenizer, mask = melayer.load(str(trained / "out"))
    # Only that the mask is applied: the weights are those that it was trained with.
    own = [str(warning.message) for warning in said if issubclass(warning.category, MelayerWarning)]
    assert len(own) == 1
    assert "The mask saved with" in own[0]
    assert mask.rate == 0.5
    assert not hasattr(model, "peft_config")
    WeMask.detach(model)
    base = melayer.load(str(trained / "base")).model
    ids = torch.tensor([[toys.X, 5, 6, 7]])
    plain = base(ids).logits
    expected = PeftModel.from_pretrained(base, str(trained / "out"))(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert (plain - expected).abs().max() > 1e-2
    assert tokenizer("w1")["input_ids"] == toys.tokenizer()("w1")["input_ids"]


def test_without_its_mask(trained):
    assert melayer.load(str(trained / "out"), mask=False).mask is None


def test_a_base_that_moved(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "melayer_tune.json").read_text())
    record["settings"]["model"]["name"] = str(tmp_path / "gone")
    (tmp_path / "out" / "melayer_tune.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match=r"out holds an adapter for .*gone, which cannot be loaded: .* with base= "):
        melayer.load(str(tmp_path / "out"))
    loaded = melayer.load(str(tmp_path / "out"), base=str(trained / "base"), mask=False)
    assert torch.isfinite(loaded.model(torch.tensor([[toys.X, 5]])).logits).all()


def test_other_weights_are_said(trained, tmp_path):
    other = small_runs.model(seed=1)
    other.save_pretrained(tmp_path / "other")
    toys.tokenizer().save_pretrained(tmp_path / "other")
    with pytest.warns(MelayerWarning, match="was trained on weights with fingerprint .*; those of .*other have"):
        melayer.load(str(trained / "out"), base=str(tmp_path / "other"), mask=False)


def test_what_is_no_adapter(trained, tmp_path):
    with pytest.raises(ModelError, match="A base was given .*, but .*base is no directory with an adapter"):
        melayer.load(str(trained / "base"), base="demo")
    (tmp_path / adapters.FILE).write_text("{")
    with pytest.raises(ModelError, match="adapter_config.json cannot be read"):
        melayer.load(str(tmp_path))
    (tmp_path / adapters.FILE).write_text("{}")
    with pytest.raises(ModelError, match="has no weights: expected adapter_model.safetensors"):
        melayer.load(str(tmp_path))
    shutil.copy(trained / "out" / "adapter_model.safetensors", tmp_path)
    with pytest.raises(ModelError, match="does not say what it was trained on. Name it with base= .--base."):
        melayer.load(str(tmp_path))
    with pytest.raises(ModelError, match="The adapter in .* does not fit"):
        melayer.load(str(tmp_path), base=str(trained / "base"))


def test_the_base_is_named_and_no_place_of_this_machine(trained):
    assert json.loads((trained / "out" / adapters.FILE).read_text())["base_model_name_or_path"] == str(trained / "base")
    checkpoint = trained / "out" / "checkpoint-3"
    assert json.loads((checkpoint / adapters.FILE).read_text())["base_model_name_or_path"] == str(trained / "base")
    # A checkpoint is a model too: the run's record above it says on which base.
    assert adapters.find(str(checkpoint)).fingerprint == adapters.find(str(trained / "out")).fingerprint
    assert str(trained) not in (trained / "out" / "README.md").read_text()  # ours, and not PEFT's
    assert not (trained / "out" / "training_args.bin").exists()


def test_measurements_take_it_as_a_model(trained):
    loaded = melayer.load(str(trained / "out"), mask=False)
    result = melayer.locate(loaded.model, loaded.tokenizer, texts=[toys.text(20, x_at=0)])
    assert result.me_layer == small_runs.ME
    hashes = weight_hashes(loaded.model)
    assert set(hashes) == {"adapter_model.safetensors", "model.safetensors"}


def test_a_mask_for_other_weights_is_not_made_to_fit(trained, tmp_path):
    """What lies beside an adapter says of a mask what it likes; the base in memory says which one it was made for."""
    shutil.copytree(trained / "out", tmp_path / "out")
    path = tmp_path / "out" / "melayer_mask.json"
    values = json.loads(path.read_text())
    values["made_for"]["fingerprint"] = "0" * 16
    path.write_text(json.dumps(values))
    with pytest.warns(MelayerWarning) as said:
        mask = melayer.load(str(tmp_path / "out")).mask
    assert mask.made_for.fingerprint == "0" * 16
    assert any("was made for" in str(warning.message) for warning in said)
