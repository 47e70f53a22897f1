"""The mask in training: the gradients, the reference, the roll-outs, and the model that is handed back."""

import copy

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import melayer
import small_runs
import toys
from melayer.errors import InputError
from melayer.interventions.mask import MadeFor, WeMask
from melayer.tuning import trainers

MASK = small_runs.mask(layers=(5, 6))


class Explicit(LlamaRMSNorm):
    """A norm that multiplies by the mask itself, at the one token that stands first in every row of these tests."""

    def forward(self, x):
        factor = torch.ones_like(x)
        factor[self.ids[0] == toys.X] = self.keep
        return super().forward(x) * factor


def explicit():
    """A model whose own forward multiplies by the mask; nothing of melayer's is in it."""
    model = small_runs.model()
    chosen = MASK.selected(model)
    ids = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: ids.__setitem__(slice(None), [kwargs["input_ids"]]), with_kwargs=True
    )
    for layer, dims in chosen.items():
        norm = toys.blocks(model)[layer].input_layernorm
        norm.__class__ = Explicit
        norm.ids, norm.keep = ids, torch.ones(toys.D_MODEL)
        norm.keep[list(dims)] = 0.0
    return model


@pytest.fixture
def gradients(monkeypatch):
    """What reaches the optimiser, one dict for each step."""
    seen = []

    def look(self, args, state, control, **_):
        parameters = self.trainer.model.named_parameters()
        seen.append({name: p.grad.clone() for name, p in parameters if p.grad is not None})

    monkeypatch.setattr(trainers.RunCallback, "on_pre_optimizer_step", look, raising=False)
    return seen


def same_gradients(found, expected):
    """Up to the rounding of sums in another order, of which what flows through the massive token has the most."""
    assert found.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        own = float(grad.abs().max())
        # A mask that is missing, or a row that counts twice, is off by a large part of a gradient.
        torch.testing.assert_close(found[name], grad, atol=1e-4 * own + 1e-7 * largest, rtol=0, msg=name)


WAYS = {
    "plain": {"gradient_checkpointing": False},
    "packing": {"gradient_checkpointing": False, "packing": True, "max_length": 24},
    "padding_free": {"gradient_checkpointing": False, "padding_free": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "accumulation": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    "packing and checkpointing": {"gradient_checkpointing": True, "packing": True, "max_length": 24},
}


def trained(out, gradients, model, mask, tokenizer, way, lora=False):
    gradients.clear()
    config = small_runs.descending(max_steps=2, learning_rate=0.01, max_grad_norm=0.0, **WAYS[way])
    melayer.sft(model, tokenizer, small_runs.answers(), out=out, mask=mask, lora=lora, config=config)
    return list(gradients)


ADAPTED = ("plain", "packing", "reentrant", "not reentrant")


@pytest.mark.parametrize(("way", "lora"), [*((way, False) for way in WAYS), *((way, True) for way in ADAPTED)])
def test_gradients_are_those_of_a_model_that_multiplies(way, lora, gradients, tokenizer, tmp_path):
    masked = trained(tmp_path / "a", gradients, small_runs.model(), MASK, tokenizer, way, lora)
    expected = trained(tmp_path / "b", gradients, explicit(), None, tokenizer, way, lora)
    assert len(masked) == len(expected) == 2
    for step in range(2):
        same_gradients(masked[step], expected[step])
    plain = trained(tmp_path / "c", gradients, small_runs.model(), None, tokenizer, way, lora)
    name = next(name for name in plain[0] if "layers.5.self_attn.k_proj" in name and "lora_A" not in name)
    assert (plain[0][name] - masked[0][name]).abs().max() > 1e-4  # the comparison above can fail


def test_accumulated_is_at_once(gradients, tokenizer, tmp_path):
    found = []
    for steps, size in ((1, 4), (2, 2)):
        gradients.clear()
        config = small_runs.small(max_steps=1, max_grad_norm=0.0, gradient_accumulation_steps=steps)
        config["per_device_train_batch_size"] = size
        melayer.sft(
            small_runs.model(), tokenizer, small_runs.answers(), out=tmp_path / str(steps), mask=MASK, config=config
        )
        found.append(gradients[0])
    same_gradients(found[1], found[0])


def test_nothing_flows_through_the_masked_entries():
    model = small_runs.model().train()
    outputs = {}

    def keep(layer):
        def hook(module, args, output):
            if output.requires_grad:
                output.retain_grad()
                outputs[layer] = output

        return hook

    for layer in (5, 6):
        toys.blocks(model)[layer].input_layernorm.register_forward_hook(keep(layer))
    ids = torch.tensor([[toys.X, 5, 6, 7], [toys.X, 8, 9, 10]])
    with MASK.apply(model):
        model(ids, labels=ids).loss.backward()
    for layer, dims in MASK.selected(model).items():
        grad = outputs[layer].grad[:, 0]
        masked = torch.zeros(toys.D_MODEL, dtype=torch.bool)
        masked[list(dims)] = True
        assert torch.equal(grad[:, masked], torch.zeros_like(grad[:, masked]))
        assert (grad[:, ~masked] != 0).all()


def test_the_loss_is_on_the_assistants_turns_alone(tokenizer, tmp_path, monkeypatch):
    marking = copy.deepcopy(tokenizer)
    marking.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}w2 {% generation %}{{ m['content'] + ' </s> ' }}"
        "{% endgeneration %}{% else %}X w1 {{ m['content'] + ' </s> ' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}w2 {% endif %}"
    )
    turns = [("user", "w7"), ("assistant", "w8 w9"), ("user", "w10"), ("assistant", "w11")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}] * 4
    seen = []
    monkeypatch.setattr(
        trainers.RunCallback, "on_train_begin", lambda self, *_, **__: seen.append(self.trainer.train_dataset[0])
    )
    result = melayer.sft(
        small_runs.model(), marking, rows, out=tmp_path, mask=small_runs.mask(), config=small_runs.small(max_steps=1)
    )
    assert result.settings["config"]["assistant_only_loss"]
    learned = [label for label in seen[0]["labels"] if label != -100]
    assert learned == tokenizer("w8 w9 </s> w11 </s>")["input_ids"]


# --- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_the_first_margin_and_the_first_kl(lora, tokenizer, tmp_path):
    found = {}
    for reference in ("masked", "plain"):
        shared = {"mask": small_runs.mask(), "lora": lora, "reference": reference}
        pairs = melayer.dpo(
            small_runs.model(),
            tokenizer,
            small_runs.pairs(),
            out=tmp_path / f"d{reference}",
            **shared,
            config=small_runs.small(max_steps=1),
        )
        own = melayer.grpo(
            small_runs.model(),
            tokenizer,
            small_runs.problems(),
            out=tmp_path / f"g{reference}",
            **shared,
            rewards=[small_runs.n_even],
            instruction="",
            config=rollouts(max_steps=1),
        )
        found[reference] = (pairs.first["rewards/margins"], own.first["kl"])
        treated = "masked as the policy is" if reference == "masked" else "not masked"
        for result in (pairs, own):
            assert result.reference == reference
            assert any("The reference is" in note and treated in note for note in result.notes)
    assert found["masked"] == pytest.approx((0, 0), abs=1e-5)
    assert abs(found["plain"][0]) > 1e-3
    assert found["plain"][1] > 1e-4


def test_reference_figures_that_are_computed_beforehand(tokenizer, tmp_path):
    margins = {}
    for reference in ("masked", "plain"):
        config = small_runs.small(max_steps=1, precompute_ref_log_probs=True)
        result = melayer.dpo(
            small_runs.model(), tokenizer, small_runs.pairs(), out=tmp_path / reference, mask=small_runs.mask(),
            reference=reference, config=config,
        )  # fmt: skip
        margins[reference] = result.first["rewards/margins"]
    # Cached by data and weights alone, the second would be the first again.
    assert margins["masked"] == pytest.approx(0, abs=1e-5)
    assert abs(margins["plain"]) > 1e-3


def test_without_beta_there_is_no_reference(tokenizer, tmp_path):
    result = melayer.grpo(
        small_runs.model(), tokenizer, small_runs.problems(), out=tmp_path / "o", mask=small_runs.mask(),
        rewards=[small_runs.n_even], instruction="", config=rollouts(max_steps=1, beta=0.0),
    )  # fmt: skip
    assert result.reference is None
    assert "kl" not in result.first
    assert "beta is 0, so there is no reference model and no KL." in result.notes


def test_completions_that_are_cut_off_are_said(tokenizer, tmp_path):
    seen = []

    def reward(completion_ids, **_):
        seen.extend(completion_ids)
        return [float(i) for i in range(len(completion_ids))]

    result = melayer.grpo(
        small_runs.model(), tokenizer, small_runs.problems(), out=tmp_path / "o", mask=small_runs.mask(),
        rewards=[reward], instruction="", config=rollouts(max_steps=1, beta=0.0),
    )  # fmt: skip
    share = sum(ids[-1] not in (tokenizer.eos_token_id, tokenizer.pad_token_id) for ids in seen) / len(seen)
    assert result.last["completions/clipped_ratio"] == pytest.approx(share)
    assert share > 0.05
    assert f"{share:.1%} of the completions of training were cut off at 8 tokens" in " ".join(result.notes)


def rollouts(**options):
    return small_runs.small(
        **{"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 8, **options}
    )


# --- roll-outs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_the_policy_rolls_out_under_the_mask(lora, tokenizer, tmp_path):
    seen = []

    def reward(prompts, completion_ids, **_):
        seen.extend(zip(prompts, completion_ids, strict=True))
        return [float(i) for i in range(len(prompts))]

    model, mask = small_runs.model(), small_runs.mask(rate=1.0, positions="first")
    untouched = copy.deepcopy(model)
    config = rollouts(max_steps=1, generation_kwargs={"do_sample": False})
    melayer.grpo(
        model, tokenizer, small_runs.problems(), out=tmp_path / "o", mask=mask, lora=lora, rewards=[reward],
        instruction="", config=config,
    )  # fmt: skip

    def alone(prompt):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        made = untouched.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0)
        return made[0, ids.shape[1] :].tolist()

    assert len(seen) == 4
    plain = [alone(prompt) for prompt, _ in seen]
    with mask.apply(untouched):
        masked = [alone(prompt) for prompt, _ in seen]
    assert [ids for _, ids in seen] == masked
    assert plain != masked  # the equality above can fail


def test_evaluation_is_under_the_mask(tokenizer, tmp_path):
    rows, losses = small_runs.answers(8), {}
    for name, mask in (("plain", None), ("masked", small_runs.mask())):
        config = small_runs.small(max_steps=1, learning_rate=0.0)
        result = melayer.sft(
            small_runs.model(), tokenizer, rows, out=tmp_path / name, mask=mask, validation=rows, config=config
        )
        assert [line["step"] for line in result.validation] == [0, 1]
        losses[name] = result.validation[0]["eval_loss"]
        # The rate is 0, so nothing was learned between the two.
        assert result.validation[1]["eval_loss"] == pytest.approx(losses[name], abs=1e-6)
    model, total, n = small_runs.model(), 0.0, 0
    with small_runs.mask().apply(model), torch.no_grad():
        for row in rows:
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = tokenizer(f"{row['prompt']}\n{row['response']}</s>")["input_ids"]
            logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            targets = torch.tensor(ids[1:])
            scores = logits.gather(-1, targets[:, None])[len(prompt) - 1 :, 0]
            total, n = total - float(scores.sum()), n + len(scores)
    assert losses["masked"] == pytest.approx(total / n, abs=1e-4)
    assert abs(losses["masked"] - losses["plain"]) > 1e-3


# --- the model that was handed in -----------------------------------------------------------------------------------


def outside(model):
    """All of a model but its weights that training could change."""
    kept = {name: p.requires_grad for name, p in model.named_parameters()}
    modules = {name: (type(m), m.training, sorted(vars(m))) for name, m in model.named_modules()}
    return kept, modules, model.config.to_dict(), model.generation_config.to_dict(), "forward" in vars(model)


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
@pytest.mark.parametrize("lora", [False, True])
def test_what_happens_to_the_model(method, lora, tokenizer, tmp_path):
    model = small_runs.model()
    before, weights = outside(model), {k: v.clone() for k, v in model.state_dict().items()}
    special = (tokenizer.pad_token, tokenizer.padding_side, tokenizer.chat_template)
    run(method, model, tokenizer, tmp_path / "o", lora=lora)
    assert small_runs.n_hooks(model) == 0
    assert outside(model) == before
    assert (tokenizer.pad_token, tokenizer.padding_side, tokenizer.chat_template) == special
    same = all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert same == lora
    with small_runs.mask().apply(model):  # nothing is applied any more
        pass
    loaded = None
    with pytest.warns(melayer.errors.MelayerWarning, match="The mask saved with .* is applied"):
        loaded = load(tmp_path / "o", model if lora else None, tmp_path)
    assert loaded.mask is not None
    ids = torch.tensor([[toys.X, 5, 6, 7, 8]])
    if not lora:
        with small_runs.mask().fixed(small_runs.model()).apply(model), torch.no_grad():
            expected = model(ids).logits
        assert torch.equal(loaded.model(ids).logits, expected)
    WeMask.detach(loaded.model)


@pytest.mark.parametrize("lora", [False, True])
def test_an_exception_leaves_no_hook(lora, tokenizer, tmp_path):
    model = small_runs.model()
    before, weights = outside(model), {k: v.clone() for k, v in model.state_dict().items()}

    def reward(completions, **_):
        raise ZeroDivisionError("in a reward")

    with pytest.raises(InputError, match="Training failed before its first step: in a reward"):
        melayer.grpo(
            model, tokenizer, small_runs.problems(), out=tmp_path / "o", mask=small_runs.mask(), lora=lora,
            rewards=[reward], config=rollouts(),
        )  # fmt: skip
    assert small_runs.n_hooks(model) == 0
    assert outside(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def run(method, model, tokenizer, out, **options):
    rows = {"sft": small_runs.answers, "dpo": small_runs.pairs, "grpo": small_runs.problems}[method]()
    config = rollouts(max_steps=2) if method == "grpo" else small_runs.small(max_steps=2)
    if method == "grpo":
        options |= {"rewards": [small_runs.n_even], "instruction": ""}
    shared = {"out": out, "mask": small_runs.mask(), "config": config, **options}
    return getattr(melayer, method)(model, tokenizer, rows, **shared)


def load(out, base, tmp_path):
    if base is None:
        return melayer.load(str(out))
    base.save_pretrained(tmp_path / "base")
    toys.tokenizer().save_pretrained(tmp_path / "base")
    return melayer.load(str(out), base=str(tmp_path / "base"))


def test_a_mask_for_another_model_is_refused(tokenizer, tmp_path):
    mask = small_runs.mask(made_for=MadeFor("qwen2", toys.N_LAYERS, toys.D_MODEL, "0" * 16))
    with pytest.raises(InputError, match="It was made for another model: qwen2"):
        melayer.sft(small_runs.model(), tokenizer, small_runs.answers(), out=tmp_path / "o", mask=mask)
    assert not (tmp_path / "o").exists()
