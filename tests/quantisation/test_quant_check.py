"""What quantising costs, on models of which it is known what the massive token does to it."""

import dataclasses
import gc
import io
import json
import math
import weakref

import pytest
import torch
from rich.console import Console
from torch.nn import functional

import melayer
import toys
from masked import ME, model_of
from melayer.errors import InputError
from melayer.interventions.baked_prefix import BakedPrefix
from melayer.interventions.mask import WeMask
from melayer.model import wiring
from melayer.model.hooks import cache_argument
from melayer.model.provenance import fingerprint
from melayer.quantisation.calibration import ScaleSet, maxima, read_scales
from melayer.quantisation.linear_inputs import find_linear_inputs
from melayer.quantisation.report import section
from melayer.quantisation.rounding import Rounding
from melayer.quantisation.sequences import cut
from melayer.quantisation.table import show_quant_check
from melayer.quantisation.treatments import TREATMENTS
from rounded import flags, replaced

T, N = 16, 5
TEXTS = [toys.text(40, x_at=None, seed=seed) for seed in range(8)]
CALIBRATION = [toys.text(40, x_at=None, seed=seed) for seed in range(20, 28)]
OPTIONS = {"texts": TEXTS, "calibration": CALIBRATION, "prefix": [toys.X], "T": T, "n_sequences": N}
DOWN = "mlp.down_proj"


def measured(model, **options):
    return melayer.quant_check(model, toys.tokenizer(), **{**OPTIONS, **options})


def sequences(texts=TEXTS, n=N, prefix=(toys.X,)):
    step = T - len(prefix)
    tokens = [toys.tokenizer()(text)["input_ids"] for text in texts]
    cut = [ids[start : start + step] for ids in tokens for start in range(0, len(ids) - step + 1, step)]
    return torch.tensor([[*prefix, *ids] for ids in cut[:n]])


def nll(model, ids, n_prefix=1):
    """Of the tokens from the second behind the prefix on."""
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, n_prefix:-1]
    return functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, n_prefix + 1 :].flatten()).item()


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


@pytest.fixture(scope="module")
def result(model):
    return measured(model)


def error_at(result, row, layer, path=DOWN):
    return next(
        value for at, value in zip(result.inputs, row.error, strict=True) if (at.layer, at.paths[0]) == (layer, path)
    )


# --- the figures ---------------------------------------------------------------------------------------------------


def test_every_setting_is_measured_on_the_same_tokens(model, result):
    kinds = [(row.format, row.granularity, row.treatment) for row in result.rows]
    assert kinds == [
        (format, granularity, treatment)
        for format in ("int8", "fp8", "int4")
        for granularity in ("per-tensor", "per-token", "per-channel")
        for treatment in ("plain", "baked", "baked+mask", "mask")
    ]
    assert (result.n_sequences, result.n_calibration, result.n_predicted) == (N, N, N * (T - 2))
    assert all(len(row.score.by_sequence) == N for row in result.rows)
    assert result.me_layer == ME
    assert result.prefix.ids == (toys.X,)
    assert result.prefix.massive == (True,)
    assert result.unquantised.nll == pytest.approx(nll(model, sequences()), abs=1e-5)
    mask = WeMask(me_layer=ME, massive_above=0.0)
    with mask.apply(model):
        assert result.unquantised_mask.nll == pytest.approx(nll(model, sequences()), abs=1e-5)


@pytest.mark.parametrize("granularity", ["per-tensor", "per-token", "per-channel"])
def test_plain_is_the_model_whose_maps_round_with_the_scales_of_the_other_texts(model, result, granularity):
    found = find_linear_inputs(wiring.read(model)).inputs
    read = {}
    handles = [
        model.get_submodule(at.names[0]).register_forward_pre_hook(
            lambda module, args, at=at: read.__setitem__(at, args[0])
        )
        for at in found
    ]
    with torch.no_grad():
        model(sequences(CALIBRATION), use_cache=False)
    for handle in handles:
        handle.remove()
    over = (0, 1, 2) if granularity == "per-tensor" else (0, 1)
    steps = [read[at].abs().amax(over) / 127 for at in found]
    steps = [step.clamp(min=torch.finfo(torch.float32).tiny) for step in steps]  # nothing but X stands in some channels
    with replaced(model, found, "int8", granularity, steps):
        expected = nll(model, sequences())
    row = result.find("int8", granularity, "plain")
    assert row.score.nll == pytest.approx(expected, abs=1e-5)
    assert row.cost.value == pytest.approx(expected - result.unquantised.nll, abs=1e-5)
    assert row.cost.low <= row.cost.value <= row.cost.high


def test_the_massive_token_costs_a_common_scale_nearly_all_and_baking_gives_it_back(result):
    plain, baked, _, mask = [result.find("int8", "per-tensor", of) for of in TREATMENTS]
    assert error_at(result, plain, ME) > 0.9  # all ordinary tokens are less than half a step
    assert error_at(result, mask, ME) > 0.9  # before the mask
    assert error_at(result, baked, ME) < 0.1
    assert baked.against_plain.value == pytest.approx(baked.score.nll - plain.score.nll, abs=1e-9)
    token = {of: result.find("int8", "per-token", of) for of in ("plain", "baked")}
    for row in token.values():
        assert error_at(result, row, ME) < 0.05
    # What the prefix is does not touch the error of other tokens, each with its own scale.
    assert error_at(result, token["plain"], ME) == pytest.approx(error_at(result, token["baked"], ME), rel=0.2)
    (worst, _), *_ = result.worst(plain)
    assert (worst.layer, worst.paths) == (ME, (DOWN,))
    assert f"block {ME} {DOWN}" in result.sentence


def test_baked_is_the_rest_of_the_sequence_on_the_cache_of_the_prefix(model, result):
    found = find_linear_inputs(wiring.read(model)).inputs
    rows = cut(toys.tokenizer(), CALIBRATION, [toys.X], T, N)
    whole = maxima(wiring.read(model), found, rows, flags(N, T), max_batch_tokens=2048)
    ids, steps = sequences(), whole.scales("int8", "per-tensor", left_out=True)
    for treatment, mask in (("baked", None), ("baked+mask", WeMask(me_layer=ME, massive_above=0.0))):
        baked = BakedPrefix.of(model, [toys.X], mask)
        with torch.no_grad(), replaced(model, found, "int8", "per-tensor", steps if mask is None else scaled(result)):
            logits = model(ids[:, 1:], use_cache=True, **{cache_argument(model): baked.rows(N)}).logits[:, :-1]
        expected = functional.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten()).item()
        assert result.find("int8", "per-tensor", treatment).score.nll == pytest.approx(expected, abs=1e-5)


def scaled(result, treatment="baked+mask"):
    return list(result.calibrated[ScaleSet(treatment, "int8", "per-tensor")])


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_families(family):
    model = model_of(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = measured(model, formats=["int8"], granularities=["per-tensor"], T=12, n_sequences=3)
    assert result.me_layer == ME
    assert all(math.isfinite(row.score.nll) for row in result.rows)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    said = " ".join(result.notes)
    assert ("What the experts of" in said) == (family in toys.EXPERTS)
    assert ("cannot be written" in said) == (family in toys.HYBRID)
    masked = (
        [] if family == "olmo2" else ["baked+mask", "mask"]
    )  # no norm before attention, whose gamma ranks dimensions
    assert [of for of in result.settings["treatments"] if "mask" in of] == masked
    assert ("Not measured: mask, since selector 'weight' ranks" in said) == (not masked)
    plain, baked = (result.find("int8", "per-tensor", of) for of in ("plain", "baked"))
    assert plain.error != baked.error
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_batch_does_not_matter():
    # In float64: in float32 another order of additions takes a value across the edge of a step.
    model = model_of("llama", dtype=torch.float64)
    together, alone = (measured(model, formats=["int8"], max_batch_tokens=size) for size in (2048, 1))
    for row in alone.rows:
        same = together.find(row.format, row.granularity, row.treatment)
        assert row.score.by_sequence == pytest.approx(same.score.by_sequence, abs=1e-5)
    for of, steps in alone.calibrated.items():
        for one, other in zip(steps, together.calibrated[of], strict=True):
            assert torch.allclose(one, other, rtol=1e-6)


def test_half_precision():
    result = measured(model_of("llama", dtype=torch.bfloat16), formats=["int8"], granularities=["per-token"])
    assert result.model.dtype == "bfloat16"
    assert all(abs(row.cost.value) < 0.1 for row in result.rows)


def test_by_default_half_of_the_texts_calibrate(model):
    result = measured(model, calibration=None, formats=["int8"], granularities=["per-tensor"], treatments=["plain"])
    assert (result.n_sequences, result.n_calibration) == (N, N)
    assert result.unquantised.nll == pytest.approx(nll(model, sequences(n=2 * N)[1::2]), abs=1e-5)


# --- what there is to bake and to mask -----------------------------------------------------------------------------


def test_without_a_massive_token_there_is_nothing_to_bake_and_nothing_to_mask():
    result = measured(toys.make("llama"), formats=["int8"], granularities=["per-tensor"])
    assert result.me_layer is None
    assert result.settings["treatments"] == ["plain", "baked"]
    said = " ".join(result.notes)
    assert "There is no ME layer" in said or "there is no ME layer" in said
    assert "there is no massive token to bake" in said
    plain, baked = result.rows
    assert error_at(result, plain, ME) < 0.05
    assert baked.score.nll == pytest.approx(plain.score.nll, abs=0.01)
    with pytest.raises(InputError, match=r"Treatment 'mask' cannot be measured: there is no ME layer"):
        measured(toys.make("llama"), treatments=["plain", "mask"])


def test_without_a_first_token_that_is_always_there_nothing_is_baked(model):
    result = measured(model, prefix=None, bos=False, formats=["int8"], granularities=["per-tensor"])
    assert result.prefix.ids == ()
    assert result.settings["treatments"] == ["plain"]  # no X, no ME layer
    with pytest.raises(InputError, match=r"Treatment 'baked' cannot be measured: the tokenizer puts no token in front"):
        measured(model, prefix=None, bos=False, treatments=["baked"])


def test_the_prefix_is_bos_where_it_is_asked_for(model):
    options = {"formats": ["int8"], "granularities": ["per-tensor"]}
    result = measured(model, prefix=None, bos=True, treatments=["plain", "baked"], **options)
    assert result.prefix.ids == (1,)
    assert result.settings["bos"] == {"asked": True, "is_prefix": True}
    assert result.unquantised.nll == pytest.approx(nll(model, sequences(prefix=(1,))), abs=1e-5)
    # This tokenizer has BOS, but never puts it in front: so nothing is put there unless it is asked for.
    result = measured(model, prefix=None, treatments=["plain"], **options)
    assert result.prefix.ids == ()
    assert result.settings["bos"] == {"asked": None, "is_prefix": False}
    assert result.unquantised.nll == pytest.approx(nll(model, sequences(prefix=()), n_prefix=0), abs=1e-5)


def test_massive_tokens_elsewhere_are_left_out_of_calibration_and_counted(model):
    texts = [toys.text(15, x_at=6, seed=1), *TEXTS]
    calibration = [toys.text(15, x_at=4, seed=2), *CALIBRATION]
    result = measured(model, texts=texts, calibration=calibration, formats=["int8"], granularities=["per-tensor"])
    assert [result.elsewhere[of].n for of in ("calibration", "evaluation")] == [1, 1]
    assert result.elsewhere["evaluation"].n_tokens == N * (T - 1)
    assert any(
        note.startswith("1 massive token of the evaluation sequences, behind the prefix and so not baked, saturates")
        for note in result.notes
    )
    plain, baked = (result.find("int8", "per-tensor", of) for of in ("plain", "baked"))
    assert error_at(result, plain, ME) > 0.9
    assert error_at(result, baked, ME) < 0.1
    of_massive = dict(zip(result.inputs, baked.error_apart, strict=True))
    assert (
        next(value for at, value in of_massive.items() if (at.layer, at.paths) == (ME, (DOWN,))) > 0.9
    )  # it saturates


def test_a_mask_may_be_given(model, tmp_path):
    mask = WeMask(rate=1.0, me_layer=ME, massive_above=100.0)
    result = measured(model, mask=mask, formats=["int8"], granularities=["per-tensor"])
    assert result.settings["mask"]["rate"] == 1.0
    with mask.apply(model):
        assert result.unquantised_mask.nll == pytest.approx(nll(model, sequences()), abs=1e-5)
    later = WeMask(rate=0.5, me_layer=ME, massive_above=100.0, positions="massive")
    result = measured(model, mask=later, formats=["int8"], granularities=["per-tensor"])
    assert result.settings["treatments"] == ["plain", "baked", "mask"]
    assert any("only a mask on first tokens can be baked" in note for note in result.notes)
    options = {"formats": ["int8"], "granularities": ["per-tensor"], "resume": tmp_path / "kept.jsonl"}
    assert measured(model, mask=later, **options) == measured(model, mask=later, **options) == result
    with pytest.raises(InputError, match="is of another quant-check: mask differs"):
        measured(model, mask=dataclasses.replace(later, massive_above=200.0), **options)


# --- what it says --------------------------------------------------------------------------------------------------


def test_what_the_treatments_change_is_said_for_every_grid(result):
    assert len(result.changes) == 3 * 3 * 3
    (baking,) = [
        change for change in result.changes
        if (change.format, change.granularity, change.what) == ("int8", "per-tensor", "baking")
    ]  # fmt: skip
    assert baking.by == result.find("int8", "per-tensor", "baked").against_plain
    beside = next(change for change in result.changes if change.what == "mask beside baking")
    assert beside.by == result.find("int8", "per-tensor", "baked+mask").by_mask


def test_terminal_and_page(result):
    console = Console(file=io.StringIO(), width=100)
    show_quant_check(result, console)
    printed = console.file.getvalue()
    flat = " ".join(printed.split())
    assert result.sentence in flat
    for row in result.rows:
        assert f"{row.score.perplexity:,.2f}" in printed
    assert f"block {ME} {DOWN}" in printed
    made = section(result)
    assert made.answer == result.sentence
    bars, errors = (part.figure["data"] for part in (made.parts[0], made.parts[2]))
    assert sum(len(trace["x"]) for trace in bars) == len(result.rows)
    assert sum(trace["visible"] for trace in bars) == len(TREATMENTS)
    assert len(errors) == len(result.rows)
    assert sum(trace["visible"] for trace in errors) == 1
    json.dumps([made.parts[0].figure, made.parts[2].figure], allow_nan=False)
    assert len(made.parts[1].rows) == len(result.changes)


def test_what_it_writes_can_be_read_again(model, result, tmp_path):
    written = result.save(tmp_path)
    assert {path.name for path in written} == {"scales.safetensors", "baked", "baked+mask"}
    found = find_linear_inputs(wiring.read(model)).inputs
    for of, steps in result.calibrated.items():
        for ours, theirs in zip(read_scales(tmp_path, found, of, fingerprint(model)), steps, strict=True):
            assert torch.equal(ours, theirs)
    ids = sequences()
    for treatment in ("baked", "baked+mask"):
        read = BakedPrefix.load(tmp_path / treatment, model)
        with torch.no_grad():
            logits = [
                model(ids[:, 1:], use_cache=True, **{cache_argument(model): of.rows(N)}).logits
                for of in (read, result.baked[treatment])
            ]
        assert torch.equal(*logits)
        assert (read.mask is None) == (treatment == "baked")
    about = json.loads((tmp_path / "scales.json").read_text())
    assert about["left_out"]["plain"] == []
    assert about["left_out"]["baked"] == [f"the prefix [{toys.X}]", "0 massive tokens elsewhere"]


def test_what_cannot_be_written_is_left_out(tmp_path):
    result = measured(model_of("qwen3_next"), formats=["int8"], granularities=["per-tensor"], T=12, n_sequences=2)
    written = result.save(tmp_path)
    assert [path.name for path in written] == ["scales.safetensors"]
    assert not (tmp_path / "baked").exists()


# --- bad input, and what is left behind ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"formats": ["int9"]}, r"There is no format 'int9'; expected some of int8, int4, fp8. Did you mean 'int8'\?"),
        ({"formats": []}, r"There is no format to measure"),
        ({"granularities": ["per-row"]}, r"There is no granularity 'per-row'; expected some of per-tensor"),
        ({"treatments": ["bake"]}, r"There is no treatment 'bake'; .* Did you mean 'baked'\?"),
        ({"calibration": TEXTS}, r"A sequence to predict .* is among those to calibrate with"),
        ({"T": 2}, r"The length T is 2; expected at least 3"),
        ({"T": 10**6}, r"the model has \d+ positions. Give a T of at most"),
        ({"T": 64}, r"No text has the 63 tokens that a sequence of T = 64 takes behind the prefix; the longest has 40"),
        ({"n_sequences": 0}, r"n_sequences is 0; expected at least 1"),
        ({"prefix": []}, r"The prefix is empty"),
        ({"prefix": [10**6]}, r"The prefix has id 1000000, but the model has tokens 0 to"),
        (
            {"calibration": None, "texts": TEXTS[:1], "T": 30},
            r"make one sequence of T = 30 tokens; expected at least two",
        ),
        ({"texts": []}, r"[Tt]ext"),
        ({"mask": WeMask(me_layer=50)}, r"block 50|50"),
        ({"rate": 2.0}, r"rate"),
        ({"layers": [50]}, r"50"),
    ],
)
def test_bad_input(model, options, said):
    with pytest.raises(InputError, match=said):
        measured(model, **options)


def test_a_model_that_is_not_finite_is_refused():
    model = toys.make("llama")
    with torch.no_grad():
        toys.ffn(toys.blocks(model)[2]).down_proj.weight.fill_(torch.inf)
    with pytest.raises(InputError, match=r"not finite from the output of block 2 on"):
        measured(model)
    model = toys.make("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(InputError, match=r"the log-losses of the unquantised model are not finite"):
        measured(model)


def test_interrupted_it_leaves_the_model_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []

    def stop(done, total):
        calls.append((done, total))
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(model, formats=["int8"], progress=stop)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not model.training


def test_the_result_keeps_no_model_alive(tmp_path):
    model = toys.make("llama")
    result, alive = measured(model, formats=["int8"]), weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert len(result.save(tmp_path)) == 2  # the scales and the baked prefix


def test_stopped_it_goes_on_with_the_settings_that_are_missing(model, result, tmp_path, monkeypatch):
    file, runs = tmp_path / "new" / "quant-check.jsonl", []
    original = Rounding.of

    def counted(self, batch):
        runs.append(1)
        if len(runs) == 5:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(Rounding, "of", counted)
    with pytest.raises(KeyboardInterrupt):
        measured(model, resume=file)
    assert len(file.read_text().splitlines()) == 1 + 4
    runs = [0] * 5
    assert measured(model, resume=file) == result
    assert len(runs) == 5 + 36 - 4
    # The settings may change from one run to the next, the batches too.
    others = measured(model, resume=file, formats=["int4"], max_batch_tokens=64).rows
    for row, kept in zip(others, result.rows[24:], strict=True):
        # What it is compared with has run in other batches.
        assert dataclasses.replace(row, cost=kept.cost) == kept
        assert row.cost.value == pytest.approx(kept.cost.value, abs=1e-5)
    assert len(runs) == 5 + 36 - 4
    for options, said in (
        ({"T": 12}, "calibration, sequences differ"),
        ({"prefix": [4]}, "calibration, mask, prefix, sequences differ"),
        ({"rate": 0.1}, "mask differs"),
    ):
        with pytest.raises(InputError, match=rf"is of another quant-check: {said}. Give another place"):
            measured(model, resume=file, **options)


def test_progress_goes_up_to_the_end(model):
    calls = []
    measured(model, formats=["int8"], granularities=["per-token"], progress=lambda *given: calls.append(given))
    done = [first for first, _ in calls]
    assert done == sorted(done)
    assert calls[-1][0] == calls[-1][1]


@pytest.mark.demo
def test_the_demo_model(demo):
    result = melayer.quant_check(
        demo.model,
        demo.tokenizer,
        formats=["int8"],
        granularities=["per-tensor", "per-token"],
        treatments=["plain", "baked"],
        bos=True,
        n_sequences=12,
        name="demo",
    )
    assert result.me_layer == 11
    plain, baked = (result.find("int8", "per-tensor", of) for of in ("plain", "baked"))
    (worst, value), *_ = result.worst(plain)
    assert (worst.layer, worst.paths) == (11, (DOWN,))
    assert value > 5 * plain.median_error
    assert plain.cost.low > 0
    assert baked.against_plain.high < 0
    assert result.find("int8", "per-token", "plain").cost.value < 0.2 * plain.cost.value
