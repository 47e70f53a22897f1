"""What creates the value of one block on one text, measured: its budget, neurons, counterfactuals and causes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from melayer.data.rows import Row
from melayer.measurements.criterion import STAGE_SHARE
from melayer.measurements.explain.neurons import FfnNeurons, Neurons, read_neurons
from melayer.measurements.explain.result import (
    Attribution,
    BudgetStep,
    Causes,
    Counterfactual,
    Direction,
    Driver,
    ExpertUse,
)
from melayer.model.decoder import Block, Decoder, Norm
from melayer.model.hooks import Point
from melayer.model.isolated_block import BlockAlone, Edit, flat, permuted, with_gamma, zeroed

ALPHAS = (0.25, 0.5, 0.75, 1.0)
"""How far gamma is moved towards its mean."""
REMOVED = (1, 2, 5, 10)
"""How many of the heaviest neurons are removed."""
MAJORITY = 0.5
"""A cause is named alone when it alone keeps at least this share of the write, or of what the block adds."""
_DRIVERS, _DIRECTIONS = 5, 5


@dataclass(frozen=True, eq=False)
class BlockOnText:
    """A block on one text: what is seen in it, and what becomes of the value under edits."""

    decoder: Decoder
    alone: BlockAlone
    row: Row
    token: int
    dim: int
    seen: Mapping[str, torch.Tensor]
    """[seq, d] at each site, and at `attn_raw`, `attn_post`, `ffn_raw`, `ffn_post` on the way there."""
    neurons: FfnNeurons | None

    @classmethod
    def read(cls, decoder: Decoder, alone: BlockAlone, row: Row, token: int | None) -> BlockOnText | None:
        """The block as it is on a text; None if not finite. `token` is followed, by default that of the largest |h|."""
        seen = alone.run(points=_points(alone.block))
        out = seen["block_out"]
        if not torch.isfinite(out).all():
            return None
        if token is None:
            token = int(out.abs().amax(dim=1).argmax())
        dim = int(out[token].abs().argmax())
        ffn = alone.block.ffn
        neurons = read_neurons(alone, ffn, token, seen) if ffn is not None else None
        return cls(decoder, alone, row, token, dim, seen, neurons)

    @property
    def block(self) -> Block:
        """The block."""
        return self.alone.block

    def at(self, site: str) -> float:
        """The followed scalar at a site."""
        return float(self.seen[site][self.token, self.dim])

    def value(self, edits: Sequence[Edit], site: str = "block_out") -> float:
        """The value at a site when the block runs under the edits."""
        points = {site: self.block.sites["ffn_out"]} if site == "ffn_out" else {}
        listen = self.neurons.listen if self.neurons else ()
        return float(self.alone.run(edits, points=points, listen=listen)[site][self.token, self.dim])

    def gamma(self, norm: Norm | None, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> list[Edit]:
        """The edits under which a norm has another gamma, by default a flat one; none where there is no norm."""
        return with_gamma(norm, change or flat(1.0), self.decoder.d_model) if norm is not None else []

    def ordinary(self) -> list[Edit] | None:
        """Every neuron's weights at most of median size; None where they are not known."""
        if self.neurons is None or any(part.up is None for part in self.neurons.parts):
            return None
        return self.neurons.scaled(Neurons.ordinary)

    def contributions(self) -> list[tuple[float, int | str | None, int]]:
        """What each neuron writes into the dimension, heaviest first."""
        if self.neurons is None:
            return []
        found = []
        for part in self.neurons.parts:
            written = (part.act.double() * part.down[self.dim].double().cpu()).tolist()
            found += [(value, part.expert, neuron) for neuron, value in enumerate(written)]
        return sorted(found, key=lambda item: -abs(item[0]))

    def without(self, n: int) -> list[Edit]:
        """The edits that remove the heaviest neurons."""
        assert self.neurons is not None
        heaviest = self.contributions()[:n]
        return self.neurons.scaled(lambda part: part.without(j for _, expert, j in heaviest if expert == part.expert))

    def causes(self) -> Causes:
        """What creates the value here."""
        block = self.block
        added = self.at("block_out") - self.at("block_in")
        write = self.at("ffn_out") if block.ffn else None
        attn_share, ffn_share = _ratio(self.at("attn_out"), added), None if write is None else _ratio(write, added)
        alone: tuple[float | None, ...] = (None, None, None, None)
        passed_on = abs(added) < STAGE_SHARE * max(abs(self.at("block_in")), abs(self.at("block_out")))
        if not passed_on and write is not None and ffn_share is not None and abs(ffn_share) >= STAGE_SHARE:
            alone = self._alone(write)
        named = dict(zip(("ffn", "gamma", "post_gamma", "joint"), alone, strict=True))
        attribution: Attribution
        if passed_on:
            attribution = "passed on"
        elif attn_share is not None and attn_share >= max(MAJORITY, ffn_share or 0.0):
            attribution = "attention"
        else:
            known = {cause: share for cause, share in named.items() if share is not None}
            cause = max(known, key=lambda cause: known[cause], default="unknown")
            # Where no cause alone keeps half of it, more than one is needed.
            enough = known.get(cause, 1.0) >= MAJORITY
            attribution = cause if enough else "joint" if len(known) > 1 else "unknown"  # type: ignore[assignment]
        return Causes(attribution, attn_share, ffn_share, *alone)

    def _alone(self, write: float) -> tuple[float | None, float | None, float | None, float | None]:
        """The shares of the FFN's write that FFN, pre-norm gamma and post-norm gamma create alone, and the rest."""
        block = self.block
        pre, post, ordinary = block.ffn_norm, block.ffn_post_norm, self.ordinary()

        def kept(*edits: list[Edit]) -> float:
            return self.value([edit for group in edits for edit in group], "ffn_out") / write

        ffn_alone = kept(self.gamma(pre), self.gamma(post))
        if ordinary is None:
            return ffn_alone, None, None, None
        none = kept(self.gamma(pre), ordinary, self.gamma(post))
        gamma_alone = kept(ordinary, self.gamma(post)) - none if pre else None
        post_alone = kept(self.gamma(pre), ordinary) - none if post else None
        return ffn_alone, gamma_alone, post_alone, 1.0 - ffn_alone - (gamma_alone or 0.0) - (post_alone or 0.0)


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


def ffn_budget(text: BlockOnText) -> tuple[BudgetStep, ...]:
    """The steps of the FFN branch and their total; empty where there is no FFN or a norm is 0."""
    block = text.block
    if block.ffn is None:
        return ()
    start = "block_in" if block.parallel else "mid"
    sites = [(start, "")]
    if block.ffn_norm is not None:
        sites.append(("ffn_in", "norm"))
    if "ffn_act" in text.seen:
        sites += [("ffn_act", "gate and up" if block.ffn.gate else "up"), ("ffn_raw", "down")]
    else:
        sites.append(("ffn_raw", "experts" if block.ffn.kind == "experts" else "FFN"))
    return _budget(text, [*sites, *_after("ffn", block.ffn_post_norm, block.sites["ffn_out"].scale)])


def attn_budget(text: BlockOnText) -> tuple[BudgetStep, ...]:
    """The same of the attention branch; empty without softmax attention."""
    block = text.block
    if block.attention is None:
        return ()
    sites = [("block_in", "")]
    if block.attn_norm is not None:
        sites.append(("attn_in", "norm"))
    sites.append(("attn_raw", "attention"))
    return _budget(text, [*sites, *_after("attn", block.attn_post_norm, block.sites["attn_out"].scale)])


def _after(branch: str, post: Norm | None, scale: float) -> list[tuple[str, str]]:
    steps = [(f"{branch}_post", "post-norm")] if post is not None else []
    return steps + ([(f"{branch}_out", "multiplier")] if scale != 1.0 else [])


def _budget(text: BlockOnText, sites: Sequence[tuple[str, str]]) -> tuple[BudgetStep, ...]:
    """log10 of the norms' ratios from site to site, and their total, which is their sum exactly."""
    massive, others = [], []
    for site, _ in sites:
        norms = torch.linalg.vector_norm(text.seen[site].double(), dim=-1)
        rest = torch.cat([norms[: text.token], norms[text.token + 1 :]])
        massive.append(_log(float(norms[text.token])))
        others.append(_log(float(rest.median())) if len(rest) else None)
    if None in massive:
        return ()

    def step(name: str, before: int, after: int) -> BudgetStep:
        start, end = massive[before], massive[after]
        assert start is not None
        assert end is not None
        start_others, end_others = others[before], others[after]
        other = None if start_others is None or end_others is None else end_others - start_others
        return BudgetStep(name, end - start, other, None if other is None else end - start - other)

    steps = [step(name, place, place + 1) for place, (_, name) in enumerate(sites[1:])]
    return (*steps, step("total", 0, len(sites) - 1))


def counterfactuals(text: BlockOnText, seeds: int) -> list[Counterfactual]:
    """The value in each counterfactual; one that is not finite is left out."""
    block, value = text.block, text.at("block_out")
    rows: list[Counterfactual] = []

    def add(name: str, edits: list[Edit]) -> None:
        found = text.value(edits)
        if math.isfinite(found):
            rows.append(Counterfactual(name, found, _ratio(found, value)))

    for alpha in ALPHAS if block.ffn_norm else ():
        add(f"gamma_flat_{alpha}", text.gamma(block.ffn_norm, flat(alpha)))
    if block.ffn_norm is not None:
        values = [text.value(text.gamma(block.ffn_norm, permuted(seed))) for seed in range(seeds)]
        if all(map(math.isfinite, values)):
            mean = sum(values) / len(values)
            rows.append(Counterfactual("gamma_permuted", mean, _ratio(mean, value), min(values), max(values)))
    for alpha in ALPHAS if block.ffn_post_norm else ():
        add(f"post_gamma_flat_{alpha}", text.gamma(block.ffn_post_norm, flat(alpha)))
    if block.attn_norm is not None:
        add("attn_gamma_flat_1.0", text.gamma(block.attn_norm))
    if block.attn_post_norm is not None:
        add("attn_post_gamma_flat_1.0", text.gamma(block.attn_post_norm))
    if text.neurons is not None:
        for n in REMOVED:
            add(f"no_top_{n}", text.without(n))
        if block.ffn_norm is not None:
            add("gamma_flat+no_top_2", [*text.gamma(block.ffn_norm), *text.without(2)])
    ordinary = text.ordinary()
    if ordinary is not None:
        add("ordinary_neurons", ordinary)
    if block.ffn is not None:
        add("no_ffn", [zeroed(block.sites["ffn_out"])])
    post = block.attn_post_norm
    add("no_attention", [zeroed(Point(post.module if post else block.mixer, "output"))])
    return rows


def interaction(rows: Sequence[Counterfactual]) -> float | None:
    """Effect of flat gamma and no top two neurons, less both effects alone; None where one was not run."""
    effects = {row.name: 1.0 - row.relative for row in rows if row.relative is not None}
    names = ("gamma_flat+no_top_2", "gamma_flat_1.0", "no_top_2")
    if not all(name in effects for name in names):
        return None
    both, gamma, neurons = (effects[name] for name in names)
    return both - gamma - neurons


def drivers(text: BlockOnText) -> tuple[Driver, ...]:
    """The input dimensions behind the top neuron's pre-activations, heaviest first."""
    assert text.neurons is not None
    _, expert, neuron = text.contributions()[0]
    part = next(part for part in text.neurons.parts if part.expert == expert)
    x = text.seen["ffn_in"][text.token].double()
    norm = text.block.ffn_norm
    gamma = None if norm is None else norm.gamma(text.decoder.d_model).cpu()
    found = []
    projections: tuple[tuple[Literal["gate", "up"], torch.Tensor | None], ...] = (("gate", part.gate), ("up", part.up))
    for name, matrix in projections:
        if matrix is None:
            continue
        added = x * matrix[neuron].double().cpu()
        bias = part.biases.get(name)
        total = float(added.sum()) + (float(bias[neuron]) if bias is not None else 0.0)
        for dim in added.abs().topk(min(_DRIVERS, len(added))).indices.tolist():
            value = float(added[dim])
            found.append(Driver(name, dim, value, _ratio(value, total), None if gamma is None else float(gamma[dim])))
    return tuple(found)


def directions(text: BlockOnText) -> tuple[Direction, ...]:
    """The FFN's write against the top left singular vectors of the down projection (the top neuron's expert's)."""
    assert text.neurons is not None
    expert = text.contributions()[0][1]
    down = next(part.down for part in text.neurons.parts if part.expert == expert).double().cpu()
    write = text.seen["ffn_raw"][text.token].double()
    # The left singular vectors of W are the eigenvectors of W W^T, which is smaller.
    squares, vectors = torch.linalg.eigh(down @ down.T)
    cosines = (vectors.T @ write).abs() / torch.linalg.vector_norm(write).clamp(min=1e-300)
    top = range(1, min(_DIRECTIONS, len(squares)) + 1)
    return tuple(Direction(rank, math.sqrt(max(float(squares[-rank]), 0.0)), float(cosines[-rank])) for rank in top)


def experts(text: BlockOnText, total: float) -> tuple[ExpertUse, ...]:
    """The experts that the token visits, with their shares of `total`, the FFN's output in the dimension."""
    found = []
    for part in text.neurons.parts if text.neurons else ():
        if part.expert is not None:
            written = float(part.act.double() @ part.down[text.dim].double().cpu())
            written += float(part.bias[text.dim]) if part.bias is not None else 0.0
            found.append(ExpertUse(part.expert, part.weight, _ratio(written, total)))
    return tuple(found)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole and math.isfinite(part) and math.isfinite(whole) else None


def _log(value: float) -> float | None:
    return math.log10(value) if value > 0 and math.isfinite(value) else None
