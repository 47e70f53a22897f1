"""One block run alone on its recorded input, with a part of it changed and no weight touched."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from melayer.errors import ArchitectureError
from melayer.model import hooks
from melayer.model.decoder import Block, Norm
from melayer.model.hooks import Point, first_tensor

Edit = tuple[Point, Callable[[torch.Tensor], "torch.Tensor | None"]]
"""A place in the block, and what becomes of the tensor there (None leaves it)."""

Called = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module was called with: args, kwargs."""


@dataclass(frozen=True, eq=False)
class BlockAlone:
    """A block with the very arguments that the model called it with on one sequence (a batch of 1, not padded)."""

    model: nn.Module
    block: Block
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    part_of: object = None
    """The call of the model that it was part of, if the model was under an edit: see `hooks.at_hand`."""

    def run(
        self,
        edits: Iterable[Edit] = (),
        *,
        points: Mapping[str, Point] | None = None,
        listen: Iterable[tuple[list[Called], nn.Module]] = (),
    ) -> dict[str, torch.Tensor]:
        """What is seen at `points`, each [seq, d] in float32 on the host, and `block_out`, under the edits.

        Args:
            edits: Applied in this order.
            points: What to watch; an edit of the same place is seen.
            listen: Modules, each with the list that gets what it is called with.
        """
        seen: dict[str, torch.Tensor] = {}

        def see(name: str, tensor: torch.Tensor) -> None:
            seen[name] = tensor.float().reshape(-1, tensor.shape[-1]).cpu()

        with ExitStack() as stack:
            stack.enter_context(hooks.measuring(self.model))
            stack.enter_context(hooks.within(self.part_of))
            stack.enter_context(hooks.edit([(change, point) for point, change in edits], lambda fn, t: fn(t)))
            stack.enter_context(hooks.watch((points or {}).items(), see))
            stack.enter_context(hooks.record_arguments(listen, lambda into, args, kwargs: into.append((args, kwargs))))
            out = first_tensor(self.block.module(*self.args, **self.kwargs))
        assert out is not None
        seen["block_out"] = out[0].float().cpu()
        return seen


def zeroed(point: Point) -> Edit:
    """The edit that makes a branch write nothing."""
    return point, torch.zeros_like


def with_gamma(norm: Norm, gamma: Callable[[torch.Tensor], torch.Tensor], d_model: int) -> list[Edit]:
    """The edits under which a norm has another scale.

    What the change of gamma adds is (new - old) * x_hat, with x_hat [seq, d_model] computed from what the norm
    reads; so a bias stays, and gamma may be 0.

    Args:
        norm: The norm to change.
        gamma: From the norm's effective gamma [d_model] to the new one.
        d_model: Its size.

    Raises:
        ArchitectureError: The norm does not compute gamma * x_hat + bias, for x_hat of RMSNorm or LayerNorm.
    """
    old = norm.gamma(d_model)
    difference = gamma(old) - old
    other = _OtherGamma(norm.name, norm.module, old, difference)
    return [(Point(norm.module, "input"), other.keep), (Point(norm.module, "output"), other.change)]


@dataclass(eq=False)
class _OtherGamma:
    """What a norm returns under another gamma; an object, so that it goes with a model that is copied or pickled."""

    name: str
    module: nn.Module
    old: torch.Tensor
    difference: torch.Tensor
    read: dict[int, torch.Tensor] = field(default_factory=dict)
    """What it reads in the call at hand, by thread."""

    def keep(self, tensor: torch.Tensor) -> None:
        """The norm is called."""
        self.read[threading.get_ident()] = tensor

    def change(self, out: torch.Tensor) -> torch.Tensor:
        """It has returned."""
        x = self.read.pop(threading.get_ident())
        normalised = _normalised(self.name, self.module, x, out, self.old.to(out.device))
        return (out.float() + self.difference.to(out.device) * normalised).to(out.dtype)


def _normalised(name: str, module: nn.Module, x: torch.Tensor, out: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    x, y = x.float(), out.float()
    eps = next((float(e) for n in ("variance_epsilon", "eps") if (e := getattr(module, n, None)) is not None), 0.0)
    bias = getattr(module, "bias", None)
    shift = bias.detach().float().to(y.device) if isinstance(bias, torch.Tensor) else torch.zeros_like(gamma)
    tolerance = max(1e-4, 4 * torch.finfo(out.dtype).eps)
    for centred in (isinstance(module, nn.LayerNorm), not isinstance(module, nn.LayerNorm)):
        kept = x - x.mean(-1, keepdim=True) if centred else x
        normalised = kept * torch.rsqrt(kept.square().mean(-1, keepdim=True) + eps)
        expected = gamma * normalised + shift
        # Near 0 an entry of x_hat is itself a difference of large numbers, so each token has a floor.
        floor = expected.square().mean(-1, keepdim=True).sqrt()
        within = (expected - y).abs() <= tolerance * (expected.abs() + floor)
        # A token that is NaN tells nothing about the norm, and must not stop the others.
        if (within | ~torch.isfinite(y)).all():
            return normalised
    raise ArchitectureError(
        f"The norm {name} ({type(module).__name__}) does not compute gamma * x / rms(x) + bias, centred or "
        "not, so its gamma cannot be changed. Its block cannot be explained; give other layers."
    )


def flat(alpha: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Gamma moved towards its mean by the share `alpha`."""
    return lambda gamma: gamma + alpha * (gamma.mean() - gamma)


def permuted(seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Gamma with its entries in another order."""

    def shuffle(gamma: torch.Tensor) -> torch.Tensor:
        order = torch.randperm(len(gamma), generator=torch.Generator().manual_seed(seed))
        return gamma[order.to(gamma.device)]

    return shuffle
