"""What the tests of fine-tuning share: a toy on which a mask matters, rows for it, and the smallest jobs."""

from __future__ import annotations

import torch

import toys
from melayer.interventions.mask import WeMask

ME = 3
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] == 'user' and 'X w1 ' or 'w2 ' }}{{ m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w2 ' }}{% endif %}"
)


def model(family: str = "llama", seed: int = 0) -> torch.nn.Module:
    """A toy with a massive activation on X, gammas that differ, and attention that matters."""
    made = toys.plant(toys.make(family, seed=seed), [(ME, 7, 300000.0)])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in toys.blocks(made):
            for name, parameter in block.named_parameters():
                if "norm" in name and "input" in name and parameter.ndim == 1:
                    parameter.add_(0.2 * torch.rand(parameter.shape, generator=generator))
                if "v_proj" in name or "o_proj" in name:
                    parameter.mul_(6)
                if "q_proj" in name or "k_proj" in name:
                    parameter.mul_(4)
        # Logits that are not all one token's.
        made.lm_head.weight.normal_(0, 0.05, generator=generator)
    return made


def mask(**options: object) -> WeMask:
    return WeMask(**{"rate": 0.6, "selector": "weight", "me_layer": ME, **options})


def answers(n: int = 16) -> list[dict[str, str]]:
    """Prompts that begin with X, and responses of different lengths."""
    return [
        {
            "prompt": toys.text(4 + i % 5, x_at=0, seed=i),
            "response": toys.text(3 + i % 4, x_at=None, seed=100 + i),
        }
        for i in range(n)
    ]


def pairs(n: int = 16) -> list[dict[str, str]]:
    return [
        {"prompt": row["prompt"], "chosen": row["response"], "rejected": toys.text(4, x_at=None, seed=200 + i)}
        for i, row in enumerate(answers(n))
    ]


def problems(n: int = 16) -> list[dict[str, str]]:
    return [{"question": row["prompt"], "answer": f"w1 #### {i + 1}"} for i, row in enumerate(answers(n))]


def n_even(completions: list[str], **_: object) -> list[float]:
    """A reward that differs from completion to completion: the share of words with an even number."""
    return [
        sum(word[1:].isdigit() and int(word[1:]) % 2 == 0 for word in text.split()) / max(len(text.split()), 1)
        for text in completions
    ]


def small(**options: object) -> dict[str, object]:
    """A few quick steps."""
    return {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, **options}


def descending(**options: object) -> dict[str, object]:
    """A few quick steps of plain gradient descent: what the weights move by are the gradients themselves.

    Adam divides a gradient by the root of its square, so that where it is little more than rounding, rounding becomes
    a step as large as any other.
    """
    return small(**{"optim": "sgd", "learning_rate": 0.1, **options})


def n_hooks(made: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in made.modules())
