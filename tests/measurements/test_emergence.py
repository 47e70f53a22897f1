"""What `locate` says of models whose massive activation emerges in other ways than in one block.

Planted are the shapes that trained models have shown; the sentences are held to the figures that were planted.
"""

import json
import re

import pytest
import torch

import melayer
import toys
from melayer.measurements.locate.report import section
from melayer.measurements.locate.table import show_locate
from rendering import checked, printed

CONTEXT = toys.text(20, x_at=4, seed=1)
MIGRATING = [(0, 7, 800.0), *((layer, 9, 4000.0) for layer in range(1, 6))]
MOSTLY_ONE = [(0, 7, 500.0), (1, 7, 400.0), (2, 7, 7200.0), *((layer, 7, 480.0) for layer in (3, 4, 5, 6))]


def located(writes, texts=(CONTEXT,), **options):
    model = toys.plant(toys.make("llama"), writes, context=CONTEXT)
    return melayer.locate(model, toys.tokenizer(), texts=list(texts), **options)


def percents(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"(-?[\d.]+)%", text)]


def test_single():
    result = located([(3, 7, 3000.0)])
    assert result.sentence.startswith(
        "The ME layer is block 3 of 8 (0-based): there token 4 (“X”) reaches |h| = 3,000 in "
    )
    assert result.sentence.endswith("; this one block creates it.")
    assert (result.peak.me_share, result.peak.standing_share) == (pytest.approx(1, abs=0.02),) * 2
    assert (result.peak.n_other_dim, result.peak.n_other_token) == (0, 0)
    assert not any("the peak" in note for note in result.notes)


@pytest.mark.parametrize("dim", [7, 9])
def test_two_stages(dim):
    result = located([(2, 7, 2500.0), (4, dim, 2700.0)])
    assert result.sentence.startswith("The ME layer is block 2 of 8")
    (stages,) = re.findall(r"it is created in stages \(block 2: ([\d.]+)%, block 4: ([\d.]+)%\)", result.sentence)
    assert [float(part) for part in stages] == pytest.approx([100 * stage.share for stage in result.stages], abs=0.06)
    assert result.peak.moves_dim == (dim == 9)
    if dim == 9:
        assert "; the peak is 2,700 in another dimension, 9, at block 4" in result.sentence
    else:
        assert re.search(r"; the peak is 5,\d\d\d in dimension 7 too at block \d, 2\.1 times as large", result.sentence)


def test_gradual():
    result = located([(layer, 7, 600.0) for layer in range(6)])
    assert result.emergence == "gradual"
    assert "it grows gradually: 6 blocks add at least 10% each, block " in result.sentence
    assert result.sentence.endswith(
        "; no one layer creates it, and block 0 is only the first after which the criterion goes on holding."
    )
    assert result.peak.me_share == pytest.approx(1 / 6, abs=0.02)


def test_gradual_and_migrating():
    result = located(MIGRATING)
    assert (result.me_layer, result.emergence) == (0, "gradual")  # the definition is as it was
    sentence = result.sentence
    assert sentence.startswith(
        "The criterion holds from block 0 of 8 (0-based) on: there token 4 (“X”) reaches |h| = 800 in "
    )
    assert "By definition that is the ME layer, but block 0 adds 0.2% of the peak, which is " in sentence
    assert " in another dimension, 9, at block 5, 21.6 times as large" in sentence
    assert sentence.endswith("So there is no one layer at which it emerges.")
    peak = result.peak
    assert (peak.layer, peak.dim, peak.token_index, peak.n_other_dim) == (5, 9, 4, 1)
    assert peak.max_abs == max(row.max_abs for row in result.blocks)
    assert peak.me_share == result.shares[0].share
    assert peak.standing_share == pytest.approx(result.shares[0].share + result.embedding_share)
    (note,) = [note for note in result.notes if "the peak" in note]
    assert note.startswith("Of the peak 0.2% stands at the output of block 0. What goes by the ME layer")


def test_where_one_block_adds_most_it_is_not_called_gradual():
    result = located(MOSTLY_ONE)
    assert result.emergence == "gradual"
    assert "grows gradually" not in result.sentence
    assert "most of it comes from block 2 (72.2%), no other adds 10%" in result.sentence
    assert result.sentence.endswith("It emerges mostly at block 2, not at the ME layer.")
    assert "Emergence: gradual, but mostly block 2" in " ".join(printed(show_locate, result).split())
    first = located([(1, 7, 7200.0), *((layer, 7, 480.0) for layer in (3, 4, 5, 6))])
    assert first.sentence.startswith("The ME layer is block 1 of 8")
    assert "most of it comes from this one block (80" in first.sentence


@pytest.mark.parametrize(
    ("writes", "how", "verdict"),
    [
        ([(0, 7, 900.0), (3, 9, 30000.0)], "block 3 alone creates it (99.9%)", "It emerges at block 3, not at"),
        (
            [(0, 7, 900.0), (3, 9, 15000.0), (4, 9, 15000.0)],
            "it is created in stages (block 3: ",
            "It emerges at blocks 3, 4, not at the ME layer.",
        ),
    ],
)
def test_what_another_block_creates_is_not_credited_to_the_me_layer(writes, how, verdict):
    result = located(writes)
    assert result.me_layer == 0
    assert "this one block" not in result.sentence
    assert how in result.sentence
    assert verdict in result.sentence


def test_shares_beyond_the_whole_and_below_zero_are_explained():
    over = located([(1, 7, -2000.0), (2, 7, 5000.0)])
    assert "but block 1 writes against the peak (-66.6% of it), which is 3,00" in over.sentence
    assert "block 2 alone creates it and more (166.6% of what is left at the peak)" in over.sentence
    assert "; before the peak block 1 takes 66.6% away" in over.sentence
    taken = located([(2, 7, 8000.0), (3, 7, -3000.0), (4, 7, 9000.0)])
    assert sum(stage.share for stage in taken.stages) > 1.1
    assert re.search(r"; before the peak block 3 takes \d\d\.\d% away", taken.sentence)
    assert "erased" not in taken.sentence


def test_what_is_erased_after_the_peak_is_said_to_be_erased():
    assert located([(3, 7, 3000.0), (6, 7, -2900.0)]).sentence.endswith("creates it, and it is erased at block 6.")


def test_none():
    result = located([])
    assert result.peak is None
    assert result.to_dict()["peak"] is None
    assert result.sentence.startswith("No massive activation was found")


def test_another_token_at_the_peak():
    """Block 1 makes one word massive, and block 4 another one, which becomes much larger."""
    model = toys.plant(toys.make("llama"), [(4, 9, 30000.0)], context=CONTEXT)
    other = toys.tokenizer()(CONTEXT)["input_ids"][11]
    assert other != toys.X
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[:, toys.SPARE] = 0
        embedding[other, toys.SPARE] = 20.0
        for block in toys.blocks(model):
            toys._silence(block, [toys.SPARE, 30])
        mlp = toys.blocks(model)[1].mlp
        for reader in (mlp.gate_proj.weight, mlp.up_proj.weight):
            reader[0] = 0
            reader[0, toys.SPARE] = 3.0
        mlp.down_proj.weight[:, 0] = 0
        mlp.down_proj.weight[30, 0] = 5.0
    result = melayer.locate(model, toys.tokenizer(), texts=[CONTEXT])
    places = {place for place, token in enumerate(toys.tokenizer()(CONTEXT)["input_ids"]) if token == other}
    assert result.me_layer == 1
    assert result.sequences[0].massive_token_index in places
    assert (result.peak.token_index, result.peak.dim, result.peak.layer) == (4, 9, pytest.approx(4, abs=3))
    assert result.peak.n_other_token == 1
    assert result.peak.me_share == pytest.approx(0, abs=0.01)  # of the token at the peak, not of the one at block 1
    assert result.shares[1].share > 0.9
    assert " of another token, 4 (“X”), at block " in result.sentence
    assert "block 4 alone creates it" in result.sentence
    frugal_like = json.loads(json.dumps(result.to_dict(), allow_nan=False))["peak"]
    assert [stage["layer"] for stage in frugal_like["stages"]] == [4]


@pytest.mark.parametrize("writes", [MIGRATING, MOSTLY_ONE, [(3, 7, 3000.0)], [(1, 7, -2000.0), (2, 7, 5000.0)], []])
def test_table_and_page_say_the_same(writes):
    result = located(writes)
    text = printed(show_locate, result, width=4000)
    assert result.sentence in text
    assert "-0.0%" not in text
    assert "+0.0%" not in text
    parts = checked(section(result))
    assert "-0.0%" not in str([(part.takeaway, getattr(part, "rows", "")) for part in parts.values()])
    if result.peak is not None and result.peak.layer != result.me_layer and writes == MIGRATING:
        (line,) = [line for line in text.splitlines() if line.strip().startswith("5 ") and "peak" in line]
        assert "17," in line
        assert parts["shares"].takeaway.count("the ME layer") == 1
