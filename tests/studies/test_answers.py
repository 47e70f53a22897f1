"""Answers with and without a mask, against `generate` itself."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import melayer
import toys
from masked import TEXT, model_of, n_hooks, state
from melayer.errors import InputError
from melayer.interventions.mask import WeMask
from melayer.studies.answers.answers import first_difference, prompt_ids
from melayer.studies.answers.result import AnswerPair

PROMPT = "X w4 w5 w6 w7"
MASK = WeMask(rate=1.0, selector="random", me_layer=3)


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


def test_both_sides_are_what_generate_gives(model):
    tokenizer = toys.tokenizer()
    result = melayer.answers(model, tokenizer, [PROMPT, "w9 w8"], mask=MASK, max_new_tokens=6)
    for answer in result.answers:
        ids = tokenizer(answer.prompt, return_tensors="pt")["input_ids"]
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        plain = model.generate(ids, **options)[0, ids.shape[1] :]
        with MASK.apply(model):
            masked = model.generate(ids, **options)[0, ids.shape[1] :]
        assert answer.plain == tokenizer.decode(plain, skip_special_tokens=True)
        assert answer.masked == tokenizer.decode(masked, skip_special_tokens=True)
        assert (answer.first_difference is None) == torch.equal(plain, masked)
    same = sum(answer.first_difference is None for answer in result.answers)
    assert result.sentence.startswith(f"The mask leaves {same} of 2 answers as they are.")


@pytest.mark.parametrize("several", [False, True])
def test_answers_that_are_cut_off(model, monkeypatch, several):
    """Whatever is the third token ends an answer: with room for three it has ended, with room for two it is cut off."""
    asked = {"prompts": [PROMPT], "mask": MASK}
    third = melayer.answers(model, toys.tokenizer(), **asked, max_new_tokens=3).answers[0].plain.split()[2]
    end = toys.tokenizer().convert_tokens_to_ids(third)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [2, end] if several else end)
    two, three = (melayer.answers(model, toys.tokenizer(), **asked, max_new_tokens=n).answers[0] for n in (2, 3))
    assert (two.plain_cut, three.plain_cut) == (True, False)
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    never = melayer.answers(model, toys.tokenizer(), **asked, max_new_tokens=3)
    assert (never.answers[0].plain_cut, never.answers[0].masked_cut) == (True, True)
    assert never.sentence.endswith(
        "At 3 tokens 1 plain and 1 masked answers were cut off; raise --max-new-tokens (max_new_tokens=...) to see "
        "their ends."
    )
    assert never.to_dict()["answers"][0]["plain_cut"] is True


def test_a_mask_of_nothing_changes_nothing_also_when_drawing(model):
    nothing = WeMask(rate=0, selector="random", me_layer=3)
    before = torch.random.get_rng_state()
    result = melayer.answers(model, toys.tokenizer(), [PROMPT], mask=nothing, max_new_tokens=12, temperature=1.5)
    assert result.answers[0].first_difference is None
    assert torch.equal(torch.random.get_rng_state(), before)
    other = melayer.answers(model, toys.tokenizer(), [PROMPT], mask=nothing, temperature=1.5, seed=1, max_new_tokens=12)
    assert other.answers[0].plain != result.answers[0].plain


def test_what_is_streamed_is_the_answer(model):
    pieces = {}

    def stream(place, side, text):
        pieces[place, side] = pieces.get((place, side), "") + text

    result = melayer.answers(model, toys.tokenizer(), [PROMPT, "w1"], mask=MASK, max_new_tokens=6, stream=stream)
    for place, answer in enumerate(result.answers):
        assert pieces[place, "plain"] == answer.plain
        assert pieces[place, "masked"] == answer.masked


def test_bad_options(model):
    cases = {
        "There is no prompt": {"prompts": []},
        "max_new_tokens is 0; expected at least 1": {"max_new_tokens": 0},
        "temperature is -1; expected 0 or more": {"temperature": -1},
        "This tokenizer has no chat template": {"system": "Be kind."},
        "the model has 256 positions": {"max_new_tokens": 256},
    }
    for message, options in cases.items():
        with pytest.raises(InputError, match=message):
            melayer.answers(
                model, toys.tokenizer(), **{"prompts": [" ".join(["w1"] * len(TEXT))], "mask": MASK, **options}
            )


# --- prompts -------------------------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}{% if m.role == 'system' %}w1{% else %}w2{% endif %} {{ m.content }} {% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}w3{% endif %}"


@pytest.fixture
def chatting():
    tokenizer = toys.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def ids_of(text):
    return toys.tokenizer()(text)["input_ids"]


def test_a_prompt_is_a_turn_under_the_template(chatting):
    assert prompt_ids(chatting, "w9", templated=True) == ids_of("w2 w9 w3")
    assert prompt_ids(chatting, "w9", templated=True, system="w8") == ids_of("w1 w8 w2 w9 w3")
    assert prompt_ids(chatting, "w9", templated=False) == ids_of("w9")


def test_the_template_is_used_where_there_is_one_unless_it_is_left_out(model, chatting):
    asked = {"mask": MASK, "max_new_tokens": 2}
    by_default = melayer.answers(model, chatting, [PROMPT], **asked)
    assert by_default.settings["chat"] is True
    assert by_default.answers[0].n_prompt_tokens == 2 + len(ids_of(PROMPT))
    assert melayer.answers(model, chatting, [PROMPT], system="w8 w8", **asked).answers[0].n_prompt_tokens == 10
    plain = melayer.answers(model, chatting, [PROMPT], chat=False, **asked)
    assert plain.settings["chat"] is False
    assert plain.answers == melayer.answers(model, toys.tokenizer(), [PROMPT], **asked).answers
    with pytest.raises(InputError, match="A system prompt was given, but the prompt is not put into the chat template"):
        melayer.answers(model, chatting, [PROMPT], chat=False, system="w8", **asked)
    with pytest.raises(InputError, match="This tokenizer has no chat template. Leave chat and the system prompt out"):
        melayer.answers(model, toys.tokenizer(), [PROMPT], chat=True, **asked)


def test_a_tokenizer_without_padding_pads_with_the_end(model):
    tokenizer = toys.tokenizer()
    tokenizer.pad_token = None
    asked = {"mask": MASK, "max_new_tokens": 4}
    assert melayer.answers(model, tokenizer, [PROMPT], **asked) == melayer.answers(
        model, toys.tokenizer(), [PROMPT], **asked
    )


# --- what comes back -----------------------------------------------------------------------------------------------

tokens = st.lists(st.integers(0, 2), max_size=6)


@given(tokens, tokens)
def test_the_first_difference(left, right):
    at = first_difference(left, right)
    assert at == first_difference(right, left)
    assert (at is None) == (left == right)
    if at is not None:
        assert left[:at] == right[:at]
        assert left[at : at + 1] != right[at : at + 1]


def test_the_result_says_what_was_asked(model):
    result = melayer.answers(
        model, toys.tokenizer(), [PROMPT], mask=MASK, max_new_tokens=2, temperature=0.5, seed=4, name="toy"
    )
    assert result.settings == {
        "max_new_tokens": 2, "chat": False, "system": None, "temperature": 0.5, "seed": 4, "layers_counted_from": 0,
    }  # fmt: skip
    assert (result.mask, result.model.name) == (MASK, "toy")
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert list(values) == ["melayer_version", "model", "settings", "mask", "answers", "sentence"]
    assert [AnswerPair(**answer) for answer in values["answers"]] == list(result.answers)


def test_the_model_is_as_it_was_also_when_interrupted(model):
    before = state(model)

    def stop(place, side, text):
        if side == "masked":
            raise KeyboardInterrupt

    model.train()
    try:
        with pytest.raises(KeyboardInterrupt):
            melayer.answers(model, toys.tokenizer(), [PROMPT], mask=MASK, max_new_tokens=3, stream=stop)
        assert model.training
    finally:
        model.eval()
    assert n_hooks(model) == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_another_mask_at_work_is_refused(model):
    with WeMask(rate=0.5, layers=[5]).apply(model), pytest.raises(InputError, match="applied to this model"):
        melayer.answers(model, toys.tokenizer(), [PROMPT], mask=MASK, max_new_tokens=2)


def test_a_prompt_that_brings_bos_does_not_get_another():
    tokenizer = toys.beginning_tokenizer()
    assert prompt_ids(tokenizer, "w4 w5", False) == prompt_ids(tokenizer, "<s> w4 w5", False) == [1, 7, 8]
    assert prompt_ids(tokenizer, "<s> <s> w4", False) == [1, 1, 7]
    assert prompt_ids(toys.tokenizer(), "w4", False) == [7]


def test_a_token_beyond_the_embedding_is_said(model):
    tokenizer = toys.tokenizer()
    tokenizer.add_tokens(["beyond"])
    with pytest.raises(InputError, match="Token id 64 was given to LlamaForCausalLM, whose embedding has 64 rows"):
        melayer.answers(model, tokenizer, ["w1 beyond"], mask=MASK, max_new_tokens=2)
