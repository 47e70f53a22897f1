"""Where the first token decides, `locate` says so: it looks at a few short texts with the others that there are."""

import json
import re

import pytest
import torch

import melayer
import toys
from command import run
from melayer.measurements.locate.first_tokens import TEXTS, TOKENS
from melayer.measurements.locate.report import section
from melayer.measurements.locate.table import show_locate
from rendering import checked, printed

BOS = 1
PLAIN = [toys.text(40, x_at=None, seed=seed) for seed in range(5)]
TEMPLATE = "{% for m in messages %}w7 w8 {{ m['content'] }}{% endfor %}"


def massive_where(token: int):
    """A model in which one token becomes massive in block 3, wherever it stands, and no other does."""
    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)])
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[token, toys.LISTEN] = embedding[toys.X, toys.LISTEN].item()
        embedding[toys.X, toys.LISTEN] = 0.0
    return model


def tokenizer(*, template: str | None = None):
    made = toys.tokenizer()
    made.chat_template = template
    return made


def located(model, texts=PLAIN, *, template=None, **options):
    return melayer.locate(model, tokenizer(template=template), texts=texts, **options)


def by_kind(result):
    return {kind: row for row in result.first_tokens.rows for kind in row.kinds}


def test_what_is_massive_only_with_bos_first():
    result = located(massive_where(BOS))
    assert result.me_layer is None  # the tokenizer does not add it
    found = by_kind(result)
    assert set(found) == {"as run", "no bos", "bos"}
    assert (found["as run"].me_layer, found["bos"].me_layer) == (None, 3)
    assert (found["bos"].token, found["bos"].n_first_massive, found["bos"].n_holding) == ("<s>", TEXTS, TEXTS)
    assert found["bos"].max_abs == pytest.approx(3000, rel=0.05)
    assert found["bos"].dim == 7
    assert found["as run"].kinds == ("as run", "no bos")
    assert [row.kinds for row in result.first_tokens.differing] == [("bos",)]
    assert result.sentence.endswith(
        f" It hangs on the first token: in {TEXTS} texts of up to {TOKENS} tokens there is no ME layer as run, but the "
        "ME layer is block 3 with “<s>” (BOS) first."
    )


def test_what_is_massive_with_bos_and_is_run_with_it():
    result = located(massive_where(BOS), bos=True)
    assert result.me_layer == 3
    found = by_kind(result)
    assert found["as run"].kinds == ("as run", "bos")
    assert (found["as run"].me_layer, found["no bos"].me_layer) == (3, None)
    assert (
        "the ME layer is block 3 as run, but there is no ME layer with no BOS (the texts' own token) first."
        in result.sentence
    )


def test_a_template_whose_first_token_is_massive_where_bos_is_not():
    tokens = toys.tokenizer().convert_tokens_to_ids(["w7"])
    texts = [text.replace("w7 ", "w9 ") for text in PLAIN]
    result = located(massive_where(tokens[0]), texts, template=TEMPLATE)
    found = by_kind(result)
    assert {kind: row.me_layer for kind, row in found.items()} == {
        "as run": None, "no bos": None, "bos": None, "template": 3,
    }  # fmt: skip
    assert result.sentence.endswith("but the ME layer is block 3 with “w7” (the chat template's) first.")


@pytest.mark.parametrize("bos", [None, True, False])
def test_where_no_first_token_matters_nothing_is_said(bos):
    nothing = located(toys.make("llama"), bos=bos, template=TEMPLATE)
    assert nothing.first_tokens.differing == ()
    assert "It hangs on" not in nothing.sentence
    texts = [toys.text(40, x_at=9, seed=seed) for seed in range(4)]
    inside = located(toys.plant(toys.make("llama"), [(3, 7, 3000.0)]), texts, bos=bos, template=TEMPLATE)
    assert inside.me_layer == 3
    assert {row.me_layer for row in inside.first_tokens.rows} == {3}
    assert {row.n_first_massive for row in inside.first_tokens.rows} == {0}
    assert "It hangs on" not in inside.sentence
    assert inside.to_dict()["first_tokens"]["flips"] is False


def test_the_first_token_massive_with_one_and_not_with_the_other():
    """X becomes massive wherever it stands: an ME layer with each, but no target for a mask on first tokens."""
    texts = [toys.text(40, x_at=0, seed=seed) for seed in range(4)]
    result = located(toys.plant(toys.make("llama"), [(3, 7, 3000.0)]), texts)
    assert {row.me_layer for row in result.first_tokens.rows} == {3}
    assert result.sentence.endswith(
        "the first token is massive as run, but the first token is not massive with “<s>” (BOS) first."
    )


def test_every_row_is_what_locate_finds_in_these_texts():
    model = massive_where(BOS)
    result = located(model, max_tokens=36)
    for kind, bos in (("as run", None), ("no bos", False), ("bos", True)):
        alone = located(model, PLAIN[:TEXTS], max_tokens=TOKENS, bos=bos, other_first_tokens=False)
        row = by_kind(result)[kind]
        top = max(alone.blocks, key=lambda block: block.max_abs)
        assert row.me_layer == alone.me_layer
        assert row.max_abs == pytest.approx(top.max_abs, rel=1e-5)
        assert (row.layer, row.massive_token_index, row.dim) == (top.layer, top.token_index, top.dim)


def test_bos_is_never_doubled():
    texts = [f"<s> {text}" for text in PLAIN]
    result = located(massive_where(BOS), texts)
    assert result.me_layer == 3
    assert by_kind(result)["as run"].kinds == ("as run", "bos")
    assert by_kind(result)["no bos"].me_layer is None


def test_a_text_of_one_token():
    result = located(massive_where(BOS), ["w3", "<s>"])
    assert by_kind(result)["as run"].kinds[0] == "as run"
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('only a system prompt') }}", "{% for %}", "{{ messages[3].content }}", ""]
)
def test_a_template_that_fails_is_said_and_stops_nothing(template):
    result = located(massive_where(BOS), template=template or None)
    assert "template" not in by_kind(result)
    said = [note for note in result.notes if note.startswith("The chat template cannot be applied: ")]
    assert len(said) == len(result.first_tokens.notes) == bool(template)


def test_a_bos_beyond_the_embedding_is_not_run():
    made = toys.tokenizer()
    made.add_special_tokens({"bos_token": "<begin>"})
    assert made.bos_token_id >= toys.VOCAB
    result = melayer.locate(toys.make("llama"), made, texts=PLAIN)
    assert "bos" not in by_kind(result)


def test_a_mask_does_not_warn_of_first_tokens_that_nobody_gave():
    """Every text begins with X, so the mask has its target; with BOS first it has none."""
    texts = [toys.text(40, x_at=0, seed=seed) for seed in range(4)]
    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)])
    mask = melayer.WeMask.from_located(located(model, texts), rate=0.5, selector="random")
    with mask.apply(model):  # warnings are errors in the tests
        assert located(model, texts).first_tokens.differing


def test_nothing_is_looked_at_where_nobody_asked_or_nothing_is_finite():
    assert located(massive_where(BOS), other_first_tokens=False).first_tokens is None
    model = massive_where(BOS)
    with torch.no_grad():
        toys.blocks(model)[2].mlp.down_proj.weight[0, 0] = float("nan")
    result = located(model)
    assert result.first_tokens is None
    assert result.to_dict()["first_tokens"] is None


def test_table_json_and_page_show_both():
    result = located(massive_where(BOS))
    text = printed(show_locate, result, width=80)
    assert "With another first token: not the same (3 texts of up to 32 tokens)" in " ".join(text.split())
    assert re.search(r"^<s> +BOS +3 +3/3 +3/3 +[23],\d{3}\.\d +[3-7]$", text, re.MULTILINE)
    assert re.search(r"^- +as run, no BOS +- +0/3 +0/3", text, re.MULTILINE)
    table = checked(section(result))["With another first token"]
    assert [row[2] for row in table.rows] == ["—", 3]
    assert table.takeaway.startswith("Something else is found with another first token.")
    values = result.to_dict()["first_tokens"]
    assert values["flips"] is True
    assert [row["kinds"] for row in values["rows"]] == [["as run", "no bos"], ["bos"]]


def test_the_command(tmp_path):
    massive_where(BOS).save_pretrained(tmp_path)
    toys.tokenizer().save_pretrained(tmp_path)
    arguments = ("locate", tmp_path, "--text", PLAIN[0], "--json")
    assert json.loads(run(*arguments).stdout)["first_tokens"]["flips"] is True
    assert json.loads(run(*arguments, "--no-other-first-tokens").stdout)["first_tokens"] is None
    frugal = json.loads(run(*arguments, "--frugal").stdout)
    assert frugal["first_tokens"] is None
    assert any("Other first tokens were not looked at" in note for note in frugal["notes"])


@pytest.mark.demo
def test_the_demo_model_finds_the_same_with_each(demo):
    result = melayer.locate(
        demo.model, demo.tokenizer, texts=["My favorite color is Dark Blue. The sky is clear today."]
    )
    rows = by_kind(result)
    assert rows["bos"].kinds == ("bos", "template")
    assert {row.me_layer for row in result.first_tokens.rows} == {11}
    assert all(row.n_first_massive == 1 for row in result.first_tokens.rows)
    assert "It hangs on" not in result.sentence
