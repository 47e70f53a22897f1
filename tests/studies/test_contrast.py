"""Two models measured alike: what moved, what did not, and what cannot be compared."""

import json
import re

import pytest

import melayer
import toys
from masked import model_of
from melayer.errors import InputError
from melayer.interventions.mask import WeMask

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
    located = melayer.locate(model, tokenizer, texts=TEXTS, name="<b>before")
    rigid = melayer.rigidity(model, tokenizer, texts=TEXTS, n_first_tokens=8, name="<b>before")
    drawn = melayer.sinks(model, tokenizer, texts=TEXTS, T=16, name="<b>before")
    assert before.to_dict() == {
        "locate": located.to_dict(), "rigidity": rigid.to_dict(), "sinks": drawn.to_dict(), "mask": None,
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
    assert values["contrast"]["figures"][0] == {"name": "ME layer", "before": 3, "after": 5}
