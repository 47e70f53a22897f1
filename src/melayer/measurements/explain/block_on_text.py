"""A block on one text: what is seen in it, and what becomes of its value under edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from melayer.data.rows import Batch, Row
from melayer.measurements.explain.ffn_neurons import FfnNeurons, read_neurons
from melayer.measurements.explain.neurons import Neurons
from melayer.model import hooks
from melayer.model.decoder import Block, Decoder, Norm
from melayer.model.forward import forward
from melayer.model.hooks import Point
from melayer.model.isolated_block import BlockAlone, Called, Edit, flat, with_gamma


@dataclass(frozen=True, eq=False)
class BlockOnText:
    """A block with its recorded input on one text, and the scalar in it that is followed."""

    decoder: Decoder
    alone: BlockAlone
    row: Row
    token: int
    dim: int
    activations: Mapping[str, torch.Tensor]
    """[seq, d] at each site, and at `attn_raw`, `attn_post`, `ffn_raw`, `ffn_post` on the way there."""
    neurons: FfnNeurons | None
    """Of its FFN for the token; None where it has none, or where they are not known."""

    @classmethod
    def read(cls, decoder: Decoder, alone: BlockAlone, row: Row, token: int | None) -> BlockOnText | None:
        """The block as it is on a text; None if not finite. `token` is followed, by default that of the largest |h|."""
        activations = alone.run(points=_points(alone.block))
        out = activations["block_out"]
        if not torch.isfinite(out).all():
            return None
        if token is None:
            token = int(out.abs().amax(dim=1).argmax())
        dim = int(out[token].abs().argmax())
        ffn = alone.block.ffn
        neurons = read_neurons(alone, ffn, token, activations) if ffn is not None else None
        return cls(decoder, alone, row, token, dim, activations, neurons)

    @property
    def block(self) -> Block:
        """The block."""
        return self.alone.block

    def at(self, site: str) -> float:
        """The followed scalar at a site."""
        return float(self.activations[site][self.token, self.dim])

    def value(self, edits: Sequence[Edit], site: str = "block_out") -> float:
        """The value at a site when the block runs under the edits."""
        points = {site: self.block.sites["ffn_out"]} if site == "ffn_out" else {}
        listen = self.neurons.listen if self.neurons else ()
        return float(self.alone.run(edits, points=points, listen=listen)[site][self.token, self.dim])

    def gamma(self, norm: Norm | None, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> list[Edit]:
        """The edits under which a norm has another gamma, by default a flat one; none where there is no norm."""
        return with_gamma(norm, change or flat(1.0), self.decoder.d_model) if norm is not None else []

    def ordinary(self) -> list[Edit] | None:
        """The edits under which every neuron's weights are at most of median size; None where they are not known."""
        if self.neurons is None or any(part.up is None for part in self.neurons.parts):
            return None
        return self.neurons.scaled(Neurons.ordinary)

    def contributions(self) -> list[tuple[float, int | str | None, int]]:
        """What each neuron writes into the dimension, its expert and its number; heaviest first."""
        if self.neurons is None:
            return []
        written = []
        for part in self.neurons.parts:
            values = (part.act.double() * part.down[self.dim].double().cpu()).tolist()
            written += [(value, part.expert, neuron) for neuron, value in enumerate(values)]
        return sorted(written, key=lambda item: -abs(item[0]))

    def bias(self) -> float:
        """What the biases of the FFN's down projections write into the dimension."""
        parts = self.neurons.parts if self.neurons else ()
        return sum(float(part.bias[self.dim]) for part in parts if part.bias is not None)

    def without(self, n: int) -> list[Edit]:
        """The edits that remove the n heaviest neurons."""
        assert self.neurons is not None
        heaviest = self.contributions()[:n]
        return self.neurons.scaled(lambda part: part.without(j for _, expert, j in heaviest if expert == part.expert))


def record_blocks(decoder: Decoder, row: Row, layers: Sequence[int]) -> list[BlockAlone]:
    """The blocks with what the model calls them with on one row, to be run again alone."""
    called: dict[int, tuple[Called, object]] = {}

    def record(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called[layer] = ((args, kwargs), hooks.at_hand())

    ids = torch.tensor([row.ids])
    modules = [(layer, decoder.blocks[layer].module) for layer in layers]
    with hooks.record_arguments(modules, record):
        forward(decoder.model, Batch((row,), ids, torch.ones_like(ids)))
    return [
        BlockAlone(decoder.model, decoder.blocks[layer], *of, part_of)
        for layer in layers
        for of, part_of in [called[layer]]
    ]


def _points(block: Block) -> dict[str, Point]:
    """The sites of a block, and where its branches can be seen before a post-norm and before the multiplier."""
    points: dict[str, Point] = {str(site): point for site, point in block.sites.items() if site != "block_out"}
    scale = block.sites["ffn_out"].scale if "ffn_out" in block.sites else 1.0
    for branch, module, post in (
        ("attn", block.mixer, block.attn_post_norm),
        ("ffn", block.ffn.module if block.ffn else None, block.ffn_post_norm),
    ):
        if module is not None:
            points[f"{branch}_raw"] = Point(module, "output")
            if post is not None:
                points[f"{branch}_post"] = Point(post.module, "output")
            # A linear mixer has no site of this name, but it writes all the same.
            points[f"{branch}_out"] = Point(post.module if post else module, "output", scale)
    return points
