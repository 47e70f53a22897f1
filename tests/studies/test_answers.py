import pytest
import torch

import melayer
import toys
from masked import TEXT, model_of
from melayer.errors import InputError
from melayer.interventions.mask import WeMask

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
    assert result.sentence == f"The mask leaves {same} of 2 answers as they are."


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
