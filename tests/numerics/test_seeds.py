"""A seed is one that every generator takes, or it is refused."""

import numpy as np
import pytest
import torch

import melayer
import small_runs
import toys
from command import failing
from masked import mask_of
from melayer.errors import InputError
from melayer.numerics.seeds import LARGEST, require_seed


@pytest.mark.parametrize("seed", [0, 7, LARGEST])
def test_what_every_generator_takes(seed):
    require_seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    np.random.default_rng(seed)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, 1.0, "0", None, True])
def test_what_not_all_take(seed):
    with pytest.raises(InputError, match=r"seed is .*; expected a whole number from 0 to 4294967295\. Give e\.g\. 0\."):
        require_seed(seed)


def test_it_is_said_where_a_seed_is_given(tokenizer, tmp_path):
    model, seed = toys.plant(toys.make("llama"), [(3, 7, 3000.0)]), 2**64
    with pytest.raises(InputError, match="seed is 18446744073709551616"):
        melayer.answers(model, tokenizer, ["X w1"], mask=mask_of(rate=0.5), seed=seed)
    with pytest.raises(InputError, match="seed is 18446744073709551616"):
        melayer.rigidity(model, tokenizer, texts=["X w1"], seed=seed)
    with pytest.raises(InputError, match="seed is 18446744073709551616"):
        melayer.sft(model, tokenizer, small_runs.answers(), out=tmp_path / "out", config=small_runs.small(), seed=seed)
    assert not (tmp_path / "out").exists()
    assert "seed is 18446744073709551616" in failing("generate", "./nowhere", "--prompt", "a", "--seed", seed)
