"""Which tokens are first: each way of calling a model, against rows taken alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from melayer.errors import InputError
from melayer.interventions.positions import positions

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def firsts(found, shape):
    if found.first is None:
        return []
    assert tuple(found.first.shape) == shape
    return [tuple(place) for place in found.first.nonzero().tolist()]


def padded(lengths, side):
    width = max(lengths)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(width - length, width) if side == "left" else slice(length)] = 1
    return mask


@given(lengths, st.sampled_from(["left", "right"]), st.booleans())
def test_padding(lengths, side, with_ids):
    mask = padded(lengths, side)
    ids = (mask.cumsum(1) - 1).clamp(min=0) if with_ids else None  # as `generate` gives them
    shape = tuple(mask.shape)
    expected = [(row, shape[1] - n if side == "left" else 0) for row, n in enumerate(lengths)]
    found = positions(shape, attention_mask=mask, position_ids=ids)
    assert firsts(found, shape) == expected
    assert torch.equal(found.real, mask.bool())


@given(lengths)
def test_packed_rows_start_again(lengths):
    ids = torch.cat([torch.arange(n) for n in lengths])[None]
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()[:-1]]
    assert firsts(positions((1, ids.shape[1]), position_ids=ids), ids.shape) == [(0, at) for at in starts]
    three = ids[None].expand(3, -1, -1)
    assert firsts(positions((1, ids.shape[1]), position_ids=three), ids.shape) == [(0, at) for at in starts]


@given(lengths, st.integers(1, 5), st.sampled_from(["left", "right"]))
def test_chunks_find_what_the_whole_finds(lengths, size, side):
    mask = padded(lengths, side)
    whole = firsts(positions(tuple(mask.shape), attention_mask=mask), tuple(mask.shape))
    found = []
    for start in range(0, mask.shape[1], size):
        shape = (len(lengths), min(size, mask.shape[1] - start))
        chunk = positions(shape, attention_mask=mask[:, : start + shape[1]], past=start)
        found += [(row, start + column) for row, column in firsts(chunk, shape)]
    assert sorted(found) == whole


@given(lengths, st.booleans(), st.booleans())
def test_the_mask_of_a_static_cache(lengths, additive, by_kind):
    mask = padded(lengths, "left").bool()
    batch, seq = mask.shape
    keys = seq + 4
    visible = torch.zeros(batch, 1, seq, keys, dtype=torch.bool)
    visible[:, 0, :, :seq] = torch.ones(seq, seq, dtype=torch.bool).tril() & mask[:, None, :]
    given_mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min) if additive else visible
    found = positions((batch, seq), attention_mask={"full_attention": given_mask} if by_kind else given_mask)
    assert firsts(found, (batch, seq)) == [(row, seq - n) for row, n in enumerate(lengths)]
    assert torch.equal(found.real, mask)
    later = visible[:, :, -1:].clone()
    later[..., seq] = True
    assert firsts(positions((batch, 1), attention_mask=later, past=seq), (batch, 1)) == []


def test_decoding_has_no_first_token():
    assert positions((2, 1), past=7).first is None
    assert positions((2, 1), attention_mask=torch.ones(2, 8), past=7).first is None
    assert positions((2, 1), attention_mask=torch.ones(2, 1), past=7).first is None
    assert positions((2, 1), position_ids=torch.full((2, 1), 7), past=7).first is None


def test_a_mask_of_another_kind_is_refused():
    with pytest.raises(InputError, match="The attention mask has 3 dimensions"):
        positions((1, 4), attention_mask=torch.ones(1, 4, 4))
    with pytest.raises(InputError, match="is a str, which does not tell padding"):
        positions((1, 4), attention_mask="causal")


@pytest.mark.parametrize("position_ids", [None, torch.arange(3)[None]])
def test_flags_are_on_the_device_of_the_tokens(position_ids):
    """A device without values stands for one that is not the host: mixing the two raises."""
    there = torch.device("meta")
    ids = None if position_ids is None else position_ids.to(there)
    assert positions((2, 3), position_ids=ids, device=there).first.device == there
    mask = torch.ones(2, 3, device=there)
    assert positions((2, 3), attention_mask=mask, position_ids=ids, device=there).first.device == there
