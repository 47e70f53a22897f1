"""Two models measured alike: what moved, what did not, and what cannot be compared."""

import json
import re
from dataclasses import replace

import pytest

import melayer
import toys
from masked import model_of
from melayer.errors import InputError
from melayer.interventions.mask import MadeFor, WeMask
from melayer.studies.contrast.contrast import fitted
from melayer.studies.contrast.report import section
from melayer.studies.contrast.table import show_contrast
from rendering import checked, printed
from sharp_attention import sharp

TEXTS = [toys.text(24, x_at=0, seed=seed) for seed in range(3)]


def measured(writes, **options):
    shared = {"texts": TEXTS, "T": 16, "n_first_tokens": 8, **options}
    return melayer.measure(toys.plant(toys.make("llama"), writes), toys.tokenizer(), **shared)


@pytest.fixture(scope="module")
def before():
    return measured([(3, 7, 3000.0)], name="<b>before")


def test_a_model_against_itself(before):
    result = melayer.contrast(before, before)
    assert result.sentence.startswith("The ME layer is block 3 in both; the sink rate after block 3 stayed at ")
    assert all(figure.before == figure.after for figure in result.figures)


def test_what_moved(before):
    result = melayer.contrast(before, measured([(5, 9, 4000.0)]))
    assert result.sentence.startswith("The ME layer was block 3 and is block 5; the sink rate after block 3 ")
    figures = {figure.name: (figure.before, figure.after) for figure in result.figures}
    assert figures["ME layer"] == (3, 5)
    assert figures["at block"][1] >= 5
    assert figures["in dimension"] == (7, 9)
    assert figures["largest |h|"] == pytest.approx((3000, 4000), rel=0.05)
    # The same blocks of both: those after the first model's ME layer.
    after = result.after.sinks
    rates = after.rate_by_layer[4:]
    assert figures["sink rate after block 3"][1] == pytest.approx(sum(rates) / len(rates))


def test_gone(before):
    result = melayer.contrast(before, measured([]))
    assert result.sentence.startswith("The ME layer was block 3 and is nowhere; ")
    figures = {figure.name: (figure.before, figure.after) for figure in result.figures}
    assert figures["lowest cosine to the next block, ME layer on"][1] is None
    neither = melayer.contrast(result.after, result.after)
    assert neither.sentence.startswith("Neither model has an ME layer; the sink rate over all blocks stayed at ")
    json.dumps(neither.to_dict(), allow_nan=False)


def test_it_is_what_the_measurements_say(before):
    model, tokenizer = toys.plant(toys.make("llama"), [(3, 7, 3000.0)]), toys.tokenizer()
    located = melayer.locate(model, tokenizer, texts=TEXTS, name="<b>before", other_first_tokens=False)
    rigid = melayer.rigidity(model, tokenizer, texts=TEXTS, n_first_tokens=8, name="<b>before")
    drawn = melayer.sinks(model, tokenizer, texts=TEXTS, T=16, name="<b>before")
    assert before.to_dict() == {
        "locate": located.to_dict(), "rigidity": rigid.to_dict(), "sinks": drawn.to_dict(), "mask": None, "notes": [],
    }  # fmt: skip
    figures = {figure.name: figure.before for figure in melayer.contrast(before, before).figures}
    assert list(figures) == [
        "ME layer", "emergence", "largest |h|", "at block", "in dimension", "sink rate", "sink rate after block 3",
        "lowest cosine to the next block, ME layer on", "cosine across first tokens at the ME layer",
        "effective rank of what attention reads",
    ]  # fmt: skip
    assert figures["emergence"] == located.emergence
    assert figures["sink rate"] == drawn.rate
    assert figures["sink rate after block 3"] == pytest.approx(drawn.rate_after_me)
    assert figures["lowest cosine to the next block, ME layer on"] == min(rigid.cosine_next[3 : rigid.rigid_until])
    assert figures["cosine across first tokens at the ME layer"] == rigid.cosine_inputs[3]
    assert figures["effective rank of what attention reads"] == rigid.mean_rank("attn_in")[0]


def test_a_mask_that_is_at_work_is_said(before):
    mask = WeMask(rate=0.5, selector="random", me_layer=3)
    model = model_of("llama")
    with mask.apply(model):
        after = melayer.measure(model, toys.tokenizer(), texts=TEXTS, T=16, n_first_tokens=8, mask=mask)
    result = melayer.contrast(before, after)
    assert result.notes[0] == "After: measured under its mask (random 0.5)."
    assert not any(note.startswith("Before: measured under") for note in result.notes)
    assert result.to_dict()["after"]["mask"]["selector"] == "random"
    # What the mask does is not credited to training.
    assert "(measured under different masks, so that changes are the masks' as well as training's)" in result.sentence


# --- four columns ----------------------------------------------------------------------------------------------------

MASK = WeMask(rate=1.0, selector="random", me_layer=3)


def four(first, second, *, mask=MASK):
    """The first and the second model, each without the mask and with it."""
    options = {"texts": TEXTS, "T": 16, "n_first_tokens": 8, "epsilon": 0.21}
    measured = []
    for model in (first, second):
        measured.append(melayer.measure(model, toys.tokenizer(), **options))
        with mask.apply(model):
            measured.append(melayer.measure(model, toys.tokenizer(), **options, mask=mask))
    before, before_masked, after, after_masked = measured
    return melayer.contrast(before, after, before_masked=before_masked, after_masked=after_masked)


def sinking(seed: int = 0):
    """A model whose heads attend unevenly to the massive first token."""
    return toys.plant(sharp("llama", seed=seed), [(3, 7, 3000.0)])


def test_what_the_mask_does_is_not_credited_to_training():
    """Training changes nothing here: the two are the same model."""
    result = four(sinking(), sinking())
    assert any(isinstance(figure.masking, float) and abs(figure.masking) > 0.01 for figure in result.figures)
    for figure in result.figures:
        assert (figure.before, figure.before_masked) == (figure.after, figure.after_masked)
        if isinstance(figure.before, float):
            assert (figure.training, figure.interaction) == (0.0, 0.0)
    rate = next(figure for figure in result.figures if figure.name == "sink rate after block 3")
    assert rate.before != rate.before_masked
    assert "; the sink rate after block 3 stayed at " in result.sentence
    assert " points 0.0 are training's, " in result.sentence
    assert result.sentence.endswith(", and 0.0 what it does beyond that to the second.")


def test_the_split_adds_up_to_the_whole_change():
    result = four(sinking(), sinking(seed=3))
    names = set()
    for figure in result.figures:
        if isinstance(figure.before, float):
            names.add(figure.name)
            parts = (figure.training, figure.masking, figure.interaction)
            assert sum(parts) == pytest.approx(figure.after_masked - figure.before)
            assert figure.training == figure.after - figure.before
            assert figure.masking == figure.before_masked - figure.before
        else:
            assert (figure.training, figure.masking, figure.interaction) == (None, None, None)
    assert names == {
        "largest |h|", "sink rate", "sink rate after block 3", "lowest cosine to the next block, ME layer on",
        "cosine across first tokens at the ME layer", "effective rank of what attention reads",
    }  # fmt: skip
    said = [float(part) for part in re.findall(r"([+-]?\d+\.\d) (?:points|are training|what)", result.sentence)]
    assert said[0] == pytest.approx(sum(said[1:]), abs=0.16)
    assert result.notes[0] == "Masked: under the mask of the second model (random 1, strength 1)."
    assert len(result.notes) == len(set(result.notes))


def test_all_four_are_in_the_dictionary_the_table_and_the_page(tmp_path):
    result = four(sinking(), sinking(seed=3))
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    for name in ("before", "before_masked", "after", "after_masked"):
        assert (values[name]["mask"] is None) == (not name.endswith("masked"))
        assert all(name in figure for figure in values["figures"])
    text = printed(show_contrast, result, width=160)
    heads = [
        "before",
        "before,",
        "masked",
        "after",
        "after,",
        "masked",
        "by",
        "training",
        "by",
        "the",
        "mask",
        "by",
        "both",
    ]
    assert any(line.split() == heads for line in text.splitlines())
    parts = checked(section(result))
    names = ["before", "before, masked", "after", "after, masked"]
    assert [trace["name"] for trace in parts["contrast-sinks"].figure["data"]] == names
    assert list(parts["The figures"].columns[1:5]) == names
    written = melayer.write_contrast_report(result, tmp_path)
    assert "random 1, strength 1; blocks: all after the ME layer" in written.html.read_text(encoding="utf-8")


def test_what_is_not_masked_is_not_taken_for_it(before):
    with pytest.raises(InputError, match="after_masked was given; expected the model under a mask there"):
        melayer.contrast(before, before, after_masked=before)
    with pytest.raises(InputError, match="before_masked is of another model than before"):
        model = sinking()
        with MASK.apply(model):
            other = melayer.measure(model, toys.tokenizer(), texts=TEXTS, T=16, n_first_tokens=8, mask=MASK)
        melayer.contrast(before, before, before_masked=other)


def test_a_mask_that_does_not_fit_the_first_model():
    other = toys.plant(toys.make("gpt2"), [(3, 7, 3000.0)])
    first = melayer.measure(other, toys.tokenizer(), texts=TEXTS, T=16, n_first_tokens=8)
    model = sinking()
    plain = melayer.measure(model, toys.tokenizer(), texts=TEXTS, T=16, n_first_tokens=8)
    mask = replace(MASK, made_for=MadeFor.of(plain.located))
    assert fitted(mask, other, first) is None
    assert fitted(replace(MASK, layers=(12,)), model, plain) is None
    assert fitted(mask, model, plain) == mask
    with mask.apply(model):
        masked = melayer.measure(model, toys.tokenizer(), texts=TEXTS, T=16, n_first_tokens=8, mask=mask)
    result = melayer.contrast(first, plain, after_masked=masked)
    assert "The mask does not fit the first model, so what it does cannot be told apart" in result.notes[1]
    assert result.sentence.endswith("% with it at work.")
    assert all(figure.interaction is None for figure in result.figures)
    assert list(checked(section(result))["The figures"].columns) == [
        "", "before", "after", "after, masked", "by training", "by the mask", "by both",
    ]  # fmt: skip


def test_parts_report_to_bars_of_their_own():
    begun, ended = [], set()

    def part(place):
        begun.append(place)
        return lambda done, total: ended.add(place) if done == total else None

    measured([(3, 7, 3000.0)], part=part)
    assert begun == [0, 1, 2]
    assert ended == {0, 1, 2}


def test_only_what_was_measured_alike(before):
    with pytest.raises(InputError, match="measured with different T, texts. Measure both alike"):
        melayer.contrast(before, measured([(3, 7, 3000.0)], T=12, texts=TEXTS[:2]))


def test_the_page(before, tmp_path):
    result = melayer.contrast(before, measured([(5, 9, 4000.0)]))
    written = melayer.write_contrast_report(result, tmp_path, command="melayer contrast a b")
    html = re.sub(r"<script>.*?</script>", "", written.html.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert result.sentence in html
    assert "<b>before" not in html
    for key in ("contrast-magnitude", "contrast-sinks", "contrast-cosine"):
        assert f'id="plot-{key}"' in html
    values = json.loads(written.json.read_text())
    assert values["contrast"]["figures"][0] == {
        "name": "ME layer", "before": 3, "after": 5, "before_masked": None, "after_masked": None, "training": None,
        "mask": None, "interaction": None,
    }  # fmt: skip
