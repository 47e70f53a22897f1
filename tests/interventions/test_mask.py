"""WeMask against the definition, against rows taken alone, and against other ways to run the same tokens."""

import copy
import json
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import StaticCache

import melayer
import toys
from hostile import masks
from masked import ME, ROWS, TEXT, close, logits, mask_of, model_of, n_hooks, padded, state
from melayer.errors import InputError, MelayerWarning, OutputError
from melayer.interventions.mask import MadeFor, WeMask
from melayer.loading.source import MASK_FILE
from melayer.model import hooks, wiring


@pytest.fixture(autouse=True)
def _texts_without_massive_tokens_are_no_matter_here(_own_warnings_are_errors):
    warnings.filterwarnings("ignore", message="No token of . sequences is massive")


SOFTMAX = {family: range(toys.N_LAYERS) for family in toys.FAMILIES} | dict.fromkeys(toys.HYBRID, (3, 7))


@pytest.fixture(params=toys.FAMILIES, scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return model_of(family)


def attn_in(model, layer, point, mask):
    """What attention reads in one block, for a text and its reverse."""
    seen = []
    around = mask.apply(model) if mask else nullcontext()
    with torch.no_grad(), around, hooks.watch([(layer, point)], lambda _, x: seen.append(x.clone())):
        model(torch.tensor([TEXT, TEXT[::-1]]))
    return seen[0]


# --- exactness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", ["random", "activation", "activation-low", "weight", "weight-low"])
def test_the_masked_entries_and_no_others_change(model, family, selector):
    decoder = wiring.read(model)
    if selector.startswith("weight") and family == "olmo2":
        with pytest.raises(
            InputError, match="has none .it normalises elsewhere.. Use 'activation', 'random' or 'dims'"
        ):
            logits(model, TEXT, mask_of(selector=selector))
        return
    for layer in SOFTMAX[family]:
        mask = mask_of(selector=selector, layers=[layer], strength=0.75, rate=0.3)
        chosen = mask.selected(model)
        point = decoder.blocks[layer].sites["attn_in"]
        plain, masked = (attn_in(model, layer, point, around) for around in (None, mask))
        expected = plain.clone()
        for row in range(2):
            x = plain[row, 0]
            if selector.startswith("activation"):
                dims = x.abs().topk(19, largest=selector == "activation").indices
            else:
                dims = torch.tensor(chosen[layer])
            assert len(dims) == 19  # floor(0.3 * 64)
            expected[row, 0, dims] = x[dims] * 0.25
        assert torch.equal(masked, expected)


@pytest.mark.parametrize("options", [{"rate": 0}, {"strength": 0}, {"rate": 0.01}])
def test_nothing_masked_is_bit_identical(model, options):
    assert torch.equal(logits(model, TEXT, mask_of(**options)), logits(model, TEXT))


def test_only_the_first_tokens_keys_and_values_differ(model, family):
    first = next(layer for layer in SOFTMAX[family] if layer > ME)
    caches = []
    for mask in (None, mask_of()):
        with torch.no_grad(), mask.apply(model) if mask else nullcontext():
            caches.append(model(torch.tensor([TEXT]), use_cache=True).past_key_values)
    for name in ("keys", "values"):
        plain, masked = (getattr(cache.layers[first], name) for cache in caches)
        assert torch.equal(plain[:, :, 1:], masked[:, :, 1:])
        assert not torch.equal(plain[:, :, 0], masked[:, :, 0])


def test_the_mask_moves_the_logits_and_leaves_nothing_behind(model):
    before, hooked, plain = state(model), n_hooks(model), logits(model, TEXT)
    mask = mask_of(rate=1.0)
    masked = logits(model, TEXT, mask)
    assert not torch.equal(masked[:, 1:], plain[:, 1:])
    with pytest.raises(ZeroDivisionError), mask.apply(model):
        assert n_hooks(model) > hooked
        _ = 1 / 0
    assert n_hooks(model) == hooked
    after = state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(model, TEXT), plain)


def test_the_authors_arithmetic_on_a_single_row():
    """arXiv:2605.08504's released code as it works on an unpadded prompt, written plainly."""
    model = model_of("llama")
    rate = 0.25

    def naive(module, args, kwargs):
        x = kwargs["hidden_states"].clone()
        top = x[0, 0].abs().topk(int(rate * x.shape[-1])).indices
        x[0, 0, top] = 0
        return args, {**kwargs, "hidden_states": x}

    handles = [block.self_attn.register_forward_pre_hook(naive, with_kwargs=True) for block in model.model.layers[7:]]
    expected = logits(model, TEXT)
    for handle in handles:
        handle.remove()
    mask = WeMask(rate=rate, selector="activation", layers=range(7, toys.N_LAYERS))
    assert torch.equal(logits(model, TEXT, mask), expected)


@pytest.mark.demo
def test_the_authors_arithmetic_on_the_demo_model(demo):
    model = demo.model
    ids = demo.tokenizer("The sky is clear today, and so is the sea.", return_tensors="pt")["input_ids"]
    handles = []
    for block in model.model.layers[7:]:

        def naive(module, args, kwargs):
            x = kwargs["hidden_states"].clone()
            x[0, 0, x[0, 0].abs().topk(57).indices] = 0
            return args, {**kwargs, "hidden_states": x}

        handles.append(block.self_attn.register_forward_pre_hook(naive, with_kwargs=True))
    expected = logits(model, ids)
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(model, ids, WeMask(rate=0.1, selector="activation", layers=range(7, 30))), expected)


# --- equivalences --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["first", "massive"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_that_row_alone(model, side, positions):
    ids, attention_mask = padded(side)
    mask = mask_of(positions=positions, massive_above=1000.0) if positions == "massive" else mask_of()
    places = (attention_mask.cumsum(1) - 1).clamp(min=0)
    batch = logits(model, ids, mask, attention_mask=attention_mask, position_ids=places)
    for place, row in enumerate(ROWS):
        alone = logits(model, row, mask)
        close(batch[place][attention_mask[place].bool()], alone[0])


# In these, packed rows are not isolated in transformers, with a mask or without: there is nothing to equal.
LEAKING = ("gpt_oss", *toys.HYBRID)


def test_a_packed_row_is_its_rows_alone(model, family):
    ids = torch.tensor([[token for row in ROWS for token in row]])
    places = torch.cat([torch.arange(len(row)) for row in ROWS])[None]

    def equal(mask):
        packed, start = logits(model, ids, mask, position_ids=places, use_cache=False), 0
        for row in ROWS:
            alone = logits(model, row, mask)[0]
            if not torch.allclose(packed[0, start : start + len(row)], alone, atol=1e-4, rtol=1e-4):
                return False
            start += len(row)
        return True

    assert equal(None) == equal(mask_of()) == (family not in LEAKING)


def test_cached_and_chunked_are_whole(model):
    whole = logits(model, TEXT, mask_of())
    for sizes in ([5, 8], [1] * 13, [12, 1]):
        cache, pieces, start = None, [], 0
        with torch.no_grad(), mask_of().apply(model):
            for size in sizes:
                out = model(torch.tensor([TEXT[start : start + size]]), past_key_values=cache, use_cache=True)
                cache, start = out.past_key_values, start + size
                pieces.append(out.logits)
        close(torch.cat(pieces, dim=1), whole)


@pytest.mark.parametrize("prefix", [1, 4])
def test_baked_is_hooked(model, prefix):
    whole = logits(model, TEXT, mask_of())
    cache = mask_of().bake(model, TEXT[:prefix])
    with torch.no_grad():
        rest = model(torch.tensor([TEXT[prefix:]]), past_key_values=copy.deepcopy(cache), use_cache=True).logits
    close(rest, whole[:, prefix:])
    assert cache.get_seq_length() == prefix
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(1, len(TEXT), dtype=torch.long)}
    baked = model.generate(torch.tensor([TEXT]), past_key_values=copy.deepcopy(cache), **options)
    with mask_of().apply(model):
        hooked = model.generate(torch.tensor([TEXT]), **options)
    assert torch.equal(baked, hooked)


def test_generation_with_and_without_a_cache(model):
    ids, attention_mask = padded("left")
    options = {"attention_mask": attention_mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with mask_of().apply(model):
        cached = model.generate(ids, **options)
        assert torch.equal(cached, model.generate(ids, **options, use_cache=False))
    for place, row in enumerate(ROWS):
        with mask_of().apply(model):
            alone = model.generate(torch.tensor([row]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        new = alone[0, len(row) :]
        assert torch.equal(cached[place, ids.shape[1] :][: len(new)], new)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_other_ways_to_generate(family):
    model = model_of(family)
    ids, attention_mask = padded("left")
    options = {"attention_mask": attention_mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with mask_of().apply(model):
        greedy = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, **options, cache_implementation="static"), greedy)
        assert torch.equal(model.generate(ids, **options, prefill_chunk_size=3), greedy)
        beams = model.generate(ids, **options, num_beams=3)
        assert torch.equal(beams, model.generate(ids, **options, num_beams=3, use_cache=False))
        one = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        alone = model.generate(torch.tensor([TEXT]), **one)
        if family == "llama":
            assisted = model.generate(torch.tensor([TEXT]), **one, assistant_model=toys.make("llama", seed=5))
            assert torch.equal(assisted, alone)


def test_a_static_cache_by_hand():
    model = model_of("llama")
    cache = StaticCache(config=model.config, max_cache_len=32)
    pieces = []
    with torch.no_grad(), mask_of().apply(model):
        for at in (slice(0, 7), slice(7, 8), slice(8, None)):
            pieces.append(model(torch.tensor([TEXT[at]]), past_key_values=cache, use_cache=True).logits)
    close(torch.cat(pieces, dim=1), logits(model, TEXT, mask_of()))


def test_massive_tokens_wherever_they_stand():
    model = model_of("llama")
    row = [9, 8, 7, toys.X, *range(20, 28)]
    mask = mask_of(positions="massive", massive_above=1000.0, layers=[5])
    seen = {}
    for key, around in {"plain": nullcontext(), "masked": mask.apply(model)}.items():
        with around, toys.capture(toys.blocks(model)[4]), torch.no_grad():
            point = wiring.read(model).blocks[5].sites["attn_in"]
            with hooks.watch([(key, point)], lambda key, x: seen.update({key: x.clone()})):
                model(torch.tensor([row]))
    changed = (seen["plain"] != seen["masked"])[0]
    assert changed.any(dim=1).nonzero().flatten().tolist() == [3]
    assert set(changed[3].nonzero().flatten().tolist()) <= set(mask.selected(model)[5])
    with mask.apply(model), torch.no_grad():
        whole = model(torch.tensor([row])).logits
        out = model(torch.tensor([row[:2]]), use_cache=True)
        rest = model(torch.tensor([row[2:]]), past_key_values=out.past_key_values).logits
    close(rest, whole[:, 2:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = model_of("llama", dtype=dtype)
    ids, attention_mask = padded("left")
    out = logits(model, ids, mask_of(), attention_mask=attention_mask)
    assert out.dtype == dtype
    assert torch.isfinite(out[attention_mask.bool()]).all()


# --- training ------------------------------------------------------------------------------------------------------


def gradients(model, rows, mask, **checkpointing):
    model = copy.deepcopy(model).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        model.enable_input_require_grads()
    with mask.apply(model):
        # Two calls before one backward pass, the second of another shape and with its first tokens elsewhere.
        losses = [model(ids, attention_mask=m, labels=ids, use_cache=False).loss for ids, m in rows]
        sum(losses).backward()
    functions = [vars(block).get("_gradient_checkpointing_func") for block in toys.blocks(model)]
    assert not any("melayer" in str(getattr(f, "func", None)) for f in functions)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("positions", ["first", "massive"])
def test_gradient_checkpointing(use_reentrant, positions):
    model = model_of("llama")
    rows = [padded("left"), (torch.tensor([TEXT[:6]]), torch.ones(1, 6, dtype=torch.long))]
    mask = mask_of(positions=positions, massive_above=1000.0 if positions == "massive" else None)
    plain = gradients(model, rows, mask)
    checked = gradients(model, rows, mask, use_reentrant=use_reentrant)
    assert plain.keys() == checked.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checked[name], gradient, atol=1e-6, rtol=1e-5)
    unmasked = gradients(model, rows, mask_of(rate=0))
    assert any(not torch.allclose(unmasked[name], gradient) for name, gradient in plain.items())


def test_a_model_wrapped_by_peft():
    from peft import LoraConfig, get_peft_model

    model = model_of("llama")
    located = melayer.locate(model, toys.tokenizer(), texts=[toys.text(20, x_at=0)])
    mask = WeMask.from_located(located, selector="random")
    expected = logits(model, TEXT, mask)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", MelayerWarning)
        assert torch.equal(logits(wrapped, TEXT, mask), expected)


# --- what is refused, what is said ---------------------------------------------------------------------------------


def test_bad_options():
    cases = {
        "rate is 1.5; expected a share between 0 and 1": {"rate": 1.5},
        "strength is -0.1; expected": {"strength": -0.1},
        "selector is 'best'; expected one of weight": {"selector": "best"},
        "positions is 'last'; expected one of first, massive": {"positions": "last"},
        "dims and selector='dims' go together": {"dims": (1, 2)},
        "The mask has no layers. Give layers=range": {"me_layer": None},
        "give me_layer and massive_above": {"positions": "massive"},
        "block 2 comes before that. Mask blocks from 4 on": {
            "positions": "massive", "massive_above": 1.0, "layers": [2, 5],
        },
    }  # fmt: skip
    for message, options in cases.items():
        with pytest.raises(InputError, match=message):
            mask_of(**options)


def test_a_mask_that_does_not_fit_touches_nothing():
    model = model_of("llama")
    hooked = n_hooks(model)
    other = MadeFor("qwen2", 24, 896, "0" * 16)
    cases = {
        "Layer 8 was asked for, but the model has blocks 0 to 7": mask_of(layers=[8]),
        "Dimension 64 was given, but the model has 0 to 63": mask_of(selector="dims", dims=[64]),
        "me_layer is 9, but the model has blocks 0 to 7": mask_of(me_layer=9),
        "made for another model: qwen2 with 24 blocks": mask_of(made_for=other),
    }
    for message, mask in cases.items():
        with pytest.raises(InputError, match=message), mask.apply(model):
            pass
        assert n_hooks(model) == hooked
    with mask_of().apply(model):
        during = n_hooks(model)
        with pytest.raises(InputError, match="is applied to this model already"), mask_of().apply(model):
            pass
        assert n_hooks(model) == during
    with mask_of().apply(model):
        pass


def test_linear_attention_is_left_out_and_refused_by_name():
    model = model_of("qwen3_5")
    assert list(mask_of().selected(model)) == [7]
    with pytest.raises(InputError, match="Block 4 has no softmax attention"):
        mask_of(layers=[4]).selected(model)


def test_compiled_models_are_refused():
    model = model_of("llama")
    with pytest.raises(InputError, match="compiled code does not see hooks"), mask_of().apply(torch.compile(model)):
        pass
    model.compile()
    with pytest.raises(InputError, match="compiled code does not see hooks"), mask_of().apply(model):
        pass


def test_other_weights_are_said():
    model, other = model_of("llama"), model_of("llama", seed=1)
    tokenizer, texts = toys.tokenizer(), [toys.text(20, x_at=0)]
    mask = WeMask.from_located(melayer.locate(model, tokenizer, texts=texts), selector="random")
    found = melayer.locate(other, tokenizer, texts=texts).model.fingerprint
    with pytest.warns(MelayerWarning, match=f"fingerprint {mask.made_for.fingerprint}; these have {found}"):
        logits(other, TEXT, mask)


def test_a_first_token_that_is_not_massive_is_said_once():
    model = model_of("llama")
    located = melayer.locate(model, toys.tokenizer(), texts=[toys.text(20, x_at=0)])
    mask = WeMask.from_located(located, selector="random")
    logits(model, TEXT, mask)  # massive: nothing to say, and a warning would be an error
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with mask.apply(model), torch.no_grad():
            for _ in range(3):
                model(torch.tensor([[5, 6, 7], [toys.X, 6, 7]]))
    assert len([w for w in said if issubclass(w.category, MelayerWarning)]) == 1
    assert "In 1 of 2 sequences the masked first token is not massive" in str(said[0].message)


def test_nothing_located_nothing_to_relax():
    located = melayer.locate(toys.make("llama"), toys.tokenizer(), texts=[toys.text(20, x_at=None)])
    with pytest.raises(InputError, match="locate found no ME layer"):
        WeMask.from_located(located)


def test_a_mask_saved_with_a_model(tmp_path):
    model = model_of("llama")
    mask = mask_of(rate=1.0)
    plain, masked = logits(model, TEXT), logits(model, TEXT, mask)
    model.save_pretrained(tmp_path)
    toys.tokenizer().save_pretrained(tmp_path)
    mask.save(tmp_path)
    with pytest.warns(MelayerWarning, match=r"The mask saved with .* is applied .random 1, strength 1.") as said:
        loaded = melayer.load(str(tmp_path))
    assert len(said) == 1
    assert loaded.mask == mask
    assert torch.equal(logits(loaded.model, TEXT), masked)
    assert torch.equal(logits(melayer.load(str(tmp_path), mask=False).model, TEXT), plain)
    with pytest.raises(InputError, match=r"take a loaded mask off with WeMask.detach"), mask.apply(loaded.model):
        pass
    WeMask.detach(loaded.model)
    assert torch.equal(logits(loaded.model, TEXT), plain)
    assert n_hooks(loaded.model) == 0
    with pytest.raises(InputError, match="No mask is attached to this model"):
        WeMask.detach(loaded.model)
    mask_of(me_layer=9).save(tmp_path)
    with pytest.raises(InputError, match="me_layer is 9, but the model has blocks 0 to 7"):
        melayer.load(str(tmp_path))


def test_what_cannot_be_baked():
    model = model_of("llama")
    with pytest.raises(InputError, match="expected one row of at least one id"):
        mask_of().bake(model, [])
    with pytest.raises(InputError, match="expected one row of at least one id"):
        mask_of().bake(model, [[1, 2], [3, 4]])
    with pytest.raises(InputError, match="Only a mask on first tokens can be baked"):
        mask_of(positions="massive", massive_above=9.0).bake(model, [1])


def test_measuring_under_a_mask():
    model = model_of("llama")
    tokenizer, texts = toys.tokenizer(), [toys.text(40, x_at=0)]
    plain = melayer.sinks(model, tokenizer, texts=texts, T=40)
    with mask_of(rate=1.0).apply(model):
        masked = melayer.sinks(model, tokenizer, texts=texts, T=40)
        assert melayer.locate(model, tokenizer, texts=texts).me_layer == ME
    assert plain.alpha[: ME + 1] == masked.alpha[: ME + 1]
    assert plain.alpha[ME + 1] != masked.alpha[ME + 1]


# --- files ---------------------------------------------------------------------------------------------------------


@given(
    st.builds(
        mask_of,
        rate=st.floats(0, 1),
        strength=st.floats(0, 1),
        selector=st.sampled_from(["weight", "weight-low", "activation", "activation-low", "random"]),
        layers=st.none() | st.lists(st.integers(0, 40)),
        seed=st.integers(0, 2**31),
        massive_above=st.none() | st.floats(0, 1e6),
        made_for=st.none() | st.just(MadeFor("llama", 8, 64, "ab" * 8)),
    )
)
def test_saved_and_loaded_is_the_same(tmp_path_factory, mask):
    directory = tmp_path_factory.mktemp("mask")
    mask.save(directory)
    assert WeMask.load(directory) == mask
    assert [path.name for path in directory.iterdir()] == [MASK_FILE]


@pytest.mark.parametrize("name", masks.MASKS)
def test_files_that_are_no_masks(name, tmp_path):
    masks.MASKS[name](tmp_path / "m")
    with pytest.raises(InputError) as refused:
        WeMask.load(tmp_path / "m")
    said = str(refused.value)
    assert "\n" not in said
    assert len(said) < 500
    assert str(tmp_path) in said


def test_what_is_said_of_them(tmp_path):
    (tmp_path / MASK_FILE).write_text(json.dumps(masks.mask()))
    good = WeMask.load(tmp_path)
    assert (good.layers, good.me_layer) == ((4, 5), 3)
    cases = {
        "is no mask: Invalid JSON: .*Save it again with": "{",
        "is no mask: version: Field required. Save it again": json.dumps({"rate": 1}),
        "has version 2, this melayer reads 1. Install a newer melayer": json.dumps(masks.mask(version=2, colour=1)),
        "colour: .*not permitted|unexpected": json.dumps(masks.mask(colour=1)),
        "is corrupt: rate is 7.0; expected a share between 0 and 1.": json.dumps(masks.mask(rate=7)),
        "rate: input should be a valid number, and 'much' stands there": json.dumps(masks.mask(rate="much")),
        "dims: input should be a valid .*and '12' stands there": json.dumps(masks.mask(selector="dims", dims="12")),
        "layers has a number twice, or not in order": json.dumps(masks.mask(layers=[5, 5])),
    }
    for message, text in cases.items():
        (tmp_path / MASK_FILE).write_text(text)
        with pytest.raises(InputError, match=message):
            WeMask.load(tmp_path)
    (tmp_path / MASK_FILE).unlink()
    with pytest.raises(InputError, match=f"holds no {MASK_FILE}"):
        WeMask.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="The mask cannot be written"):
        mask_of().save(tmp_path / "file")


def test_a_mask_of_the_first_version_has_no_by_layer(tmp_path):
    values = {name: value for name, value in masks.mask().items() if name != "by_layer"}
    (tmp_path / MASK_FILE).write_text(json.dumps(values))
    assert WeMask.load(tmp_path).by_layer is None


@pytest.mark.parametrize("where", ["~nosuchuser", "x" * 300, "a\0b", "\ud800", "org/na me", "", "a/b/c/d"])
def test_names_of_places_where_no_mask_can_be(where, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError):
        WeMask.load(where)


SOME = {
    "rate": ["0.5", True, None, float("nan"), float("inf"), -0.1, 1.1, 10**400, 1j, [0.5], np.bool_(True)],
    "strength": ["1", False, float("nan"), 2],
    "selector": [None, 3, ["weight"], "Weight"],
    "positions": [None, True, "last"],
    "layers": ["45", b"45", 4, [4.0], ["4"], [True], [-1], [10**30], {4: 5}, [[4]], [None], range(10**12), np.ones(2)],
    "dims": ["12", 12, [1.5], ["1"], [True], [-1], [np.True_], torch.ones(2)],
    "seed": ["0", 0.0, True, -1, None, 2**63, np.float64(1)],
    "me_layer": ["3", 3.0, True, -1, 2**40],
    "massive_above": ["9", True, -1.0, float("nan"), float("inf"), [9]],
    "made_for": ["llama", {"family": "llama"}, 3],
    "by_layer": ["12", ["12", "34"], [[1.0], [2]], [[True], [2]], [[-1], [2]], [1, 2], 3, {"4": [1]}, [[1]]],
}


@pytest.mark.parametrize("name", SOME)
def test_what_is_no_field_is_refused_in_python_too(name):
    more = {"dims": {"selector": "dims"}, "by_layer": {"layers": [4, 5]}}.get(name, {})
    for value in SOME[name]:
        with pytest.raises(InputError) as refused:
            mask_of(**{**more, name: value})
        assert name in str(refused.value), value


def test_numbers_of_numpy_are_numbers(tmp_path):
    given = {
        "rate": np.float32(0.5), "strength": np.int64(1), "layers": np.arange(4, 6), "seed": np.uint8(3),
        "me_layer": np.int32(3), "massive_above": np.float64(9),
    }  # fmt: skip
    mask = mask_of(**given)
    mask.save(tmp_path)
    assert WeMask.load(tmp_path) == mask
    assert mask == mask_of(rate=0.5, layers=(4, 5), seed=3, massive_above=9.0)
    assert mask_of(selector="dims", dims=torch.tensor([5, 2, 5])).dims == (2, 5)


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "family": ["", 3, None, "a\nb", "x" * 300, "\ud800"],
        "n_layers": ["8", True, -1, 8.0],
        "d_model": ["64", False, 2**40],
        "fingerprint": [0, "", "0" * 15, "0" * 17, "x" * 16, "A" * 16],
    }.items(),
)
def test_what_a_mask_was_made_for(name, values):
    good = {"family": "llama", "n_layers": 8, "d_model": 64, "fingerprint": "0" * 16}
    for value in values:
        with pytest.raises(InputError, match=f"made_for.{name} is "):
            MadeFor(**{**good, name: value})


# --- chats ---------------------------------------------------------------------------------------------------------


@pytest.mark.demo
def test_the_fixed_beginning_of_a_chat(demo):
    model, tokenizer, _ = demo
    prefix = melayer.fixed_prefix(tokenizer)
    # Not the line break: one that a message begins with would merge with it.
    assert tokenizer.decode(prefix).endswith("<|im_end|>\n<|im_start|>user")
    system = melayer.fixed_prefix(tokenizer, system="Answer in French.")
    assert "Answer in French." in tokenizer.decode(system)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert ids[0, : len(prefix)].tolist() == prefix
    mask = WeMask(rate=0.5, layers=range(12, 30))
    cache = mask.bake(model, prefix)
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    baked = model.generate(ids, past_key_values=copy.deepcopy(cache), **options)
    with mask.apply(model):
        hooked = model.generate(ids, **options)
    assert torch.equal(baked, hooked)


def test_a_tokenizer_without_a_template():
    with pytest.raises(InputError, match="has no chat template"):
        melayer.fixed_prefix(toys.tokenizer())


@pytest.mark.demo
def test_rows_of_the_demo_model(demo):
    texts = ["The sky is clear today, and so is the sea.", "One.", "2 + 2 = 4, and 3 + 3 = 6. What is 4 + 4?"]
    mask = WeMask(rate=0.5, layers=range(12, 30))
    rows = [demo.tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))

    def difference(ids, attention_mask, around):
        places = (attention_mask.cumsum(1) - 1).clamp(min=0)
        batch = logits(demo.model, ids, around, attention_mask=attention_mask, position_ids=places)
        pairs = ((batch[place][attention_mask[place].bool()], row) for place, row in enumerate(rows))
        return max(float((found - logits(demo.model, row, around)[0]).abs().max()) for found, row in pairs)

    for side in ("left", "right"):
        ids, attention_mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
        for place, row in enumerate(rows):
            at = slice(width - len(row), width) if side == "left" else slice(len(row))
            ids[place, at], attention_mask[place, at] = torch.tensor(row), 1
        # With a mask a row in a batch and alone differ as they do without: by what this machine's kernels round.
        kernels = difference(ids, attention_mask, None)
        assert difference(ids, attention_mask, mask) < 10 * kernels + 1e-5 < 0.1
    moved = (logits(demo.model, rows[0], mask) - logits(demo.model, rows[0])).abs().max()
    assert moved > 0.1  # a mask that is missing from one of the two would be seen


def test_a_fixed_mask_stays_what_it_is_when_weights_change(tmp_path):
    model = model_of("llama")
    mask = WeMask(rate=0.25, me_layer=ME)
    fixed = mask.fixed(model)
    assert fixed.layers == tuple(range(ME + 1, toys.N_LAYERS))
    chosen = mask.selected(model)
    assert fixed.selected(model) == chosen
    assert torch.equal(logits(model, TEXT, fixed), logits(model, TEXT, mask))
    with torch.no_grad():
        for block in toys.blocks(model):
            block.input_layernorm.weight.copy_(block.input_layernorm.weight.flip(0))
    assert mask.selected(model) != chosen
    assert fixed.selected(model) == chosen
    fixed.save(tmp_path)
    assert WeMask.load(tmp_path) == fixed
    # What is chosen by token, or by nothing, keeps being so.
    assert WeMask(selector="activation", me_layer=ME).fixed(model).by_layer is None
    assert WeMask(strength=0, me_layer=ME).fixed(model).by_layer is None
    with pytest.raises(InputError, match="by_layer holds the dimensions of each of layers. Make it with mask.fixed"):
        WeMask(me_layer=ME, layers=(4, 5), by_layer=((1,),))
    with pytest.raises(InputError, match="Dimension 99 was given, but the model has 0 to 63"):
        WeMask(layers=(4,), by_layer=((99,),)).selected(model)


def test_a_mask_that_is_off_for_some_calls():
    model, mask, on = model_of("llama"), mask_of(), []
    plain, masked = logits(model, [TEXT]), logits(model, [TEXT], mask)
    with mask.apply(model, when=lambda: bool(on)), torch.no_grad():
        assert torch.equal(model(torch.tensor([TEXT])).logits, plain)
        on.append(True)
        assert torch.equal(model(torch.tensor([TEXT])).logits, masked)
        on.clear()
        assert torch.equal(model(torch.tensor([TEXT])).logits, plain)
    assert not torch.equal(plain, masked)
