"""The sweep against its parts, and a file that lets it go on."""

import dataclasses
import io
import json
import math
import warnings

import pytest
import torch
from rich.console import Console
from scipy.stats import ttest_1samp

import melayer
import toys
from masked import ME, model_of
from melayer.data.texts import builtin_texts
from melayer.errors import InputError, MelayerError, MelayerWarning, OutputError
from melayer.interventions.mask import WeMask
from melayer.measurements.sinks.sinks import sinks_on
from melayer.runs import jsonl
from melayer.studies.sweep.report import section
from melayer.studies.sweep.result import SweepPoint
from melayer.studies.sweep.sweep import check_grid
from melayer.studies.sweep.table import show_sweep

# The windows of T = 32 after the first of each text do not begin with X: there the mask has no target.
TEXTS = [toys.text(32, x_at=0, seed=1), toys.text(70, x_at=0, seed=2)]
GRID = {"rates": [0, 0.5, 1], "selectors": ["weight", "random"], "T": 32, "epsilon": 0.04}


def measured(model, **options):
    return melayer.sweep(model, toys.tokenizer(), **{"texts": TEXTS, **GRID, **options})


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


@pytest.fixture(scope="module")
def result(model):
    return measured(model)


@pytest.fixture
def counted(monkeypatch):
    """How often sinks are measured; `stop_at` interrupts there."""
    count = {"n": 0, "stop_at": None}
    real = sinks_on

    def counting(*arguments, **options):
        count["n"] += 1
        if count["n"] == count["stop_at"]:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr("melayer.studies.sweep.point.sinks_on", counting)
    return count


# --- the figures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 4])
def test_each_point_is_what_the_measurements_say_under_its_mask(model, result, place):
    point = result.points[place]
    tokenizer, located = toys.tokenizer(), melayer.locate(model, toys.tokenizer(), texts=TEXTS)
    # Rate 0 of any selector is the plain model.
    mask = WeMask.from_located(located, selector=point.selector or "activation", rate=point.rate)
    with warnings.catch_warnings(), mask.apply(model):
        warnings.simplefilter("ignore", MelayerWarning)  # on the windows without X
        predicted = melayer.perplexity(model, tokenizer, texts=TEXTS, T=32)
        drawn = melayer.sinks(model, tokenizer, texts=TEXTS, T=32, epsilon=0.04)
        rigid = melayer.rigidity(model, tokenizer, texts=TEXTS, located=located, n_first_tokens=9)
    assert result.me_layer == drawn.me_layer == ME
    assert point.perplexity == predicted.perplexity
    assert (point.sink_rate, point.sink_rate_by_layer, point.alpha) == (drawn.rate, drawn.rate_by_layer, drawn.alpha)
    assert point.sink_rate_after_me == pytest.approx(drawn.rate_after_me)
    assert (point.cosine_next, point.cosine_peak) == (rigid.cosine_next, rigid.cosine_peak)
    after = rigid.cosine_next[ME : rigid.rigid_until]
    assert point.cosine_rigid == pytest.approx(sum(after) / len(after))
    assert (point.rank_attn_in, point.rank_attn_in_without) == rigid.mean_rank("attn_in")
    assert (point.rank_block_out, point.rank_block_out_without) == rigid.mean_rank("block_out")


def test_the_grid_is_measured_once_each(model, result, counted):
    assert [point.label for point in result.points] == ["plain", "weight 0.5", "weight 1", "random 0.5", "random 1"]
    again = measured(model, rates=[0.5, 0.5, 1.0], selectors=["weight", "random", "weight"])
    assert (again.plain, again.masked) == (result.plain, result.masked)  # the plain model without being asked for
    assert counted["n"] == 5
    alone = measured(model, rates=[0])
    assert (alone.plain, alone.masked) == (result.plain, ())
    assert alone.sentence.endswith("no mask was measured.")
    # All dimensions are all dimensions, however they were chosen.
    weight, drawn = (dataclasses.replace(result.masked[place], selector=None) for place in (1, 3))
    assert weight == drawn


def test_what_a_mask_takes_its_options_from(model, result):
    others = measured(model, rates=[0.5], selectors=["random"], seed=1, strength=0.5, layers=[5])
    assert others.settings["layers"] == [5]
    plain, masked = others.plain, others.masked[0]
    assert masked.alpha[:5] == plain.alpha[:5]
    assert masked.alpha[5] != plain.alpha[5]
    assert masked.alpha[5] != result.points[3].alpha[5]


def test_a_mask_without_a_target_is_noted_once(result):
    (note,) = [note for note in result.notes if "masked first token is not massive" in note]
    assert note.startswith("In 1 of 3 sequences the masked first token is not massive")


@pytest.mark.filterwarnings("error")
def test_the_batch_size_changes_nothing(model, result):
    one = measured(model, rates=[0.5], selectors=["random"], max_batch_tokens=1)
    for left, right in zip(one.points, (result.plain, result.points[3]), strict=True):
        assert left.perplexity == pytest.approx(right.perplexity, abs=1e-4)
        assert left.sink_rate == right.sink_rate
        assert left.cosine_next == pytest.approx(right.cosine_next, abs=1e-5)
        assert left.rank_attn_in == pytest.approx(right.rank_attn_in, abs=1e-3)


def test_the_model_is_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured(model, rates=[0.5], selectors=["activation"])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_progress_goes_on_to_the_end(model):
    seen = []
    measured(model, rates=[1], selectors=["random"], progress=lambda *at: seen.append(at))
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {102 + 2 * (102 + 2 * 3 * 32)}
    assert done[-1] == totals[0]


def test_to_dict_is_plain_and_stable(result):
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert set(values) >= {"melayer_version", "model", "settings", "sentence", "me_layer", "T", "epsilon", "notes"}
    assert "located" not in values
    assert values["settings"]["rates"] == [0, 0.5, 1]
    assert [SweepPoint.from_dict(point) for point in values["masked"]] == list(result.masked)
    assert SweepPoint.from_dict(values["plain"]) == result.plain


def test_differences_are_those_of_the_sequences(model, result):
    """Each mask against the plain model by Student's t over what each sequence loses, from perplexity alone."""
    located = melayer.locate(model, toys.tokenizer(), texts=TEXTS)
    plain = melayer.perplexity(model, toys.tokenizer(), texts=TEXTS, T=32)
    values = result.to_dict()
    assert len(values["differences"]) == len(result.masked) == 4
    for point, by in zip(result.masked, values["differences"], strict=True):
        mask = WeMask.from_located(located, selector=point.selector, rate=point.rate)
        with warnings.catch_warnings(), mask.apply(model):
            warnings.simplefilter("ignore", MelayerWarning)
            masked = melayer.perplexity(model, toys.tokenizer(), texts=TEXTS, T=32)
        change = [(b - a) / 31 for a, b in zip(plain.by_sequence, masked.by_sequence, strict=True)]
        expected = ttest_1samp(change, 0).confidence_interval()
        assert by["value"] == pytest.approx(sum(change) / 3)
        assert (by["low"], by["high"]) == pytest.approx((expected.low, expected.high))
        # In percent of the perplexity it is the same interval.
        assert math.log1p(result.change(point)) == pytest.approx(by["value"])
        assert result.change_interval(point) == pytest.approx((math.expm1(by["low"]), math.expm1(by["high"])))
        assert (point.perplexity_low, point.perplexity_high) == (masked.low, masked.high)
    assert "With 3 sequences the intervals of the perplexities are rough." in result.notes


def test_one_sequence_has_no_interval(model):
    alone = measured(model, texts=TEXTS[:1], rates=[0.5], selectors=["weight"])
    assert alone.n_sequences == 1
    by = alone.difference(alone.masked[0])
    assert by.value == pytest.approx(math.log1p(alone.change(alone.masked[0])))
    assert (by.low, by.high, alone.change_interval(alone.masked[0])) == (None, None, None)
    assert "One sequence gives no intervals: give more or longer texts, or a smaller T." in alone.notes
    assert "interval" not in alone.sentence


def test_what_an_older_version_kept_without_intervals_is_refused(model, result, tmp_path):
    file = tmp_path / "sweep.jsonl"
    measured(model, resume=file)
    head, *lines = map(json.loads, file.read_text().splitlines())
    for line in lines[1:]:
        for field in ("nll_by_sequence", "perplexity_low", "perplexity_high"):
            del line["point"][field]
    for line in (head, *lines):  # nor had its lines checksums
        del line["crc32"]
    file.write_text("".join(json.dumps(line) + "\n" for line in (head, *lines)))
    before = file.read_bytes()
    with pytest.raises(InputError, match="line 3: it has fields that this version does not know, or lacks some"):
        measured(model, resume=file)
    assert file.read_bytes() == before


def test_the_sentence_is_of_the_figures(result):
    def with_perplexities(*values):
        pairs = zip(result.masked, values, strict=True)
        made = tuple(dataclasses.replace(point, perplexity=value) for point, value in pairs)
        made = tuple(dataclasses.replace(p, sink_rate_after_me=place / 4) for place, p in enumerate(made))
        return dataclasses.replace(
            result,
            plain=dataclasses.replace(result.plain, perplexity=20.0, sink_rate_after_me=0.9, nll_by_sequence=()),
            masked=made,
        ).sentence

    start = "Without a mask the perplexity is 20.00 and the sink rate after the ME layer (block 3) 90.0%; "
    assert with_perplexities(30, 21, 20.5, 50) == (
        f"{start}2 of 4 masks raise the perplexity by at most 5 %, and of these weight 1 leaves the fewest sinks: "
        "25.0% at a perplexity of 21.00 (+5.0%)."
    )
    assert with_perplexities(30, 22, 23, 50) == (
        f"{start}each of the 4 masks raises the perplexity by more than 5 %, weight 1 least (+10.0%)."
    )


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": [0.5, 1.5]}, "rate is 1.5; expected a share between 0 and 1"),
        ({"rates": [float("nan")]}, "rate is nan; expected a share"),
        ({"rates": []}, "There are no rates to sweep over. Give at least one"),
        ({"selectors": []}, "There are no selectors to sweep over"),
        ({"selectors": ["best"]}, "selector is 'best'; expected one of weight, weight-low, activation, "),
        ({"selectors": ["dims"]}, "selector is 'dims'; expected one of"),
        ({"strength": 2.0}, "strength is 2.0; expected a share"),
        ({"layers": [8]}, "Layer 8 was asked for, but the model has blocks 0 to 7"),
        ({"epsilon": 2.0}, "epsilon is 2.0; expected a share of attention"),
        ({"T": 200}, "No text has T = 200 tokens; the longest has 70"),
    ],
)
def test_bad_input_is_said_before_anything_runs(model, monkeypatch, tmp_path, options, message):
    monkeypatch.setattr("melayer.studies.sweep.sweep.locate_on", None)
    with pytest.raises(InputError, match=message):
        measured(model, resume=tmp_path / "sweep.jsonl", **options)
    assert not list(tmp_path.iterdir())


def test_a_family_without_a_norm_before_attention(monkeypatch):
    model = model_of("olmo2")
    points = measured(model, selectors=["activation", "random"], rates=[0.5]).masked
    assert [point.label for point in points] == ["activation 0.5", "random 0.5"]
    monkeypatch.setattr("melayer.studies.sweep.sweep.locate_on", None)
    with pytest.raises(InputError, match="selector 'weight' ranks dimensions by the gamma .* Use 'activation', 'rand"):
        measured(model)


def test_a_masked_model_is_refused(model):
    with WeMask(rate=0.5, layers=[5]).apply(model), pytest.raises(InputError, match="applied to this model"):
        measured(model)


def test_without_an_me_layer_there_is_nothing_to_sweep():
    with pytest.raises(InputError, match="locate found no ME layer .* so there is nothing to sweep"):
        measured(toys.make("llama"))


def test_hybrid_families_are_swept_where_they_have_attention():
    result = measured(model_of("qwen3_next"), rates=[0.5], selectors=["weight"])
    assert result.plain.alpha[4] is None
    assert result.plain.sink_rate_after_me == result.plain.sink_rate_by_layer[7]


def test_a_grid():
    assert check_grid([1, 0, 0.5, 0.5], ["random", "random"]) == [("random", 0.5), ("random", 1.0)]


# --- going on ------------------------------------------------------------------------------------------------------


def test_a_second_run_measures_nothing_again(model, result, counted, tmp_path):
    file = tmp_path / "new" / "sweep.jsonl"
    first = measured(model, resume=file)
    assert first == result
    assert counted["n"] == 5
    before = file.read_bytes()
    assert measured(model, resume=file).to_dict() == result.to_dict()
    assert counted["n"] == 5
    assert file.read_bytes() == before
    # The grid may grow; what is there stays.
    grown = measured(model, resume=file, rates=[0.25, 0.5], selectors=["random"], max_batch_tokens=64)
    assert counted["n"] == 6
    assert grown.masked[1] == result.points[3]


@pytest.mark.parametrize("lost", [1, 10, 400])
def test_an_interrupted_sweep_goes_on(model, result, counted, tmp_path, lost):
    file = tmp_path / "sweep.jsonl"
    counted["stop_at"] = 4
    with pytest.raises(KeyboardInterrupt):
        measured(model, resume=file)
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 3
    # The last line was not written to its end.
    file.write_bytes(b"".join(lines)[:-lost])
    counted.update(n=0, stop_at=None)
    assert measured(model, resume=file) == result
    assert counted["n"] == 3
    assert [json.loads(line)["point"]["rate"] for line in file.read_text().splitlines()[1:]] == [0, 0.5, 1, 0.5, 1]


def test_a_file_of_another_sweep_is_refused(model, tmp_path):
    file = tmp_path / "sweep.jsonl"
    measured(model, rates=[0], resume=file)
    before = file.read_bytes()
    cases = {
        "sweep.jsonl is of another sweep: T differs": {"T": 16},
        "of another sweep: epsilon, seed differ. Give another place, or remove it": {"seed": 1, "epsilon": 0.1},
        "of another sweep: .*texts_sha256 differ": {"texts": TEXTS[1:]},
    }
    for message, options in cases.items():
        with pytest.raises(InputError, match=message):
            measured(model, resume=file, **options)
    other = model_of("llama", seed=1)
    with pytest.raises(InputError, match="of another sweep: fingerprint differs"):
        measured(other, resume=file)
    assert file.read_bytes() == before


def test_files_that_are_no_sweeps(model, tmp_path):
    file = tmp_path / "sweep.jsonl"
    measured(model, rates=[0], resume=file)
    head, point = file.read_text().splitlines()
    (tmp_path / "kept.jsonl").write_bytes(file.read_bytes())
    for lines, said in (
        (["[]", point], "was not written by melayer"),
        (["{", point], "was not written by melayer"),
        ([head, "{}"], "holds no sweep that can be read: line 2 is not as it was written"),
        ([head, point[:40], point], "holds no sweep that can be read: line 2 is not as it was written"),
        ([head, point.replace("rate", "x")], "holds no sweep that can be read: line 2 is not as it was written"),
    ):
        file.write_text("\n".join(lines) + "\n")
        before = file.read_bytes()
        with pytest.raises(MelayerError, match=said):
            measured(model, resume=file)
        assert file.read_bytes() == before
    # Whole lines that are no points of this version.
    for change, said in (({"rate": "0"}, "rate: input should be a valid number"), ({"more": 1}, "does not know")):
        of = jsonl.read(tmp_path / "kept.jsonl", "", "").values
        of[1]["point"] |= change
        file.unlink()
        jsonl.replace(file, of)
        with pytest.raises(InputError, match=f"holds no sweep that can be read: line 2: .*{said}"):
            measured(model, resume=file)
    # Nothing is finished in these, so nothing can be lost.
    for text in (head, head[:60], head + "\n"):
        file.write_text(text)
        measured(model, rates=[0], resume=file)
        assert file.read_text().splitlines() == [head, point]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="The sweep cannot be kept in .* Give another place"):
        measured(model, resume=tmp_path / "file" / "sweep.jsonl")


# --- what is shown -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 200])
def test_no_number_is_ever_cut(result, width):
    file = io.StringIO()
    show_sweep(result, Console(file=file, width=width))
    lines = file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    assert result.sentence in " ".join(" ".join(lines).split())
    shown = next(line for line in lines if line.split()[:1] == ["weight"] and "/" in line).split()
    point = result.masked[0]
    assert shown[:4] == ["weight", "0.5", f"{point.perplexity:.2f}", f"{result.change(point):+.1%}"]
    assert shown[5] == f"{point.sink_rate_after_me:.1%}"
    assert shown[6] == f"{point.cosine_rigid:.4f}"


def test_the_section_has_every_mask_in_every_plot(result):
    parts = {getattr(part, "key", "table"): part for part in section(result).parts}
    assert list(parts) == [
        "sweep-perplexity", "sweep-sinks", "sweep-both", "sweep-heads", "sweep-cosine", "table",
    ]  # fmt: skip
    for key in ("sweep-heads", "sweep-cosine"):
        figure = parts[key].figure
        assert [trace["visible"] for trace in figure["data"]] == [True, *[False] * 4]
        buttons = figure["layout"]["updatemenus"][0]["buttons"]
        assert [button["label"] for button in buttons] == [point.label for point in result.points]
        for place, button in enumerate(buttons):
            assert button["args"][0]["visible"] == [other == place for other in range(5)]
    for key in ("sweep-perplexity", "sweep-sinks"):
        assert [trace["name"] for trace in parts[key].figure["data"]] == ["weight", "random", "no mask"]
    assert parts["sweep-perplexity"].figure["data"][0]["x"] == [0, 0.5, 1]
    assert len(parts["table"].rows) == 5


def test_a_sweep_of_the_plain_model_alone_makes_a_page_too(model, tmp_path):
    alone = measured(model, rates=[0])
    written = melayer.write_report(alone.located, tmp_path, sweep=alone)
    assert json.loads(written.json.read_text())["sweep"] == json.loads(json.dumps(alone.to_dict()))
    assert alone.sentence in written.html.read_text()
    other = measured(model_of("llama", seed=1), rates=[0])
    with pytest.raises(InputError, match="The SweepResult is of another model"):
        melayer.write_report(alone.located, tmp_path, sweep=other)


@pytest.mark.demo
def test_the_demo_model(demo):
    # Measured before on other texts with T = 256: 11.96, 11.95 and 15.75; sinks 0.85, 0.65 and 0.22. The shape holds.
    texts = builtin_texts()[:2]
    result = melayer.sweep(demo.model, demo.tokenizer, rates=[0, 0.5, 1], selectors=["weight"], texts=texts)
    assert result.me_layer == 11
    plain, half, whole = result.points
    assert half.perplexity < 1.15 * plain.perplexity
    assert whole.perplexity > 1.2 * plain.perplexity
    assert whole.sink_rate_after_me < half.sink_rate_after_me < plain.sink_rate_after_me
    assert plain.cosine_rigid > 0.99
