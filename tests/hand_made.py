"""Results made by hand, of a model with four blocks, for what shows them: every figure is known, no model runs.

Names and tokens are hostile: what a page or a terminal could take for markup.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from melayer.census.counts import Census
from melayer.census.observe import Place
from melayer.census.result import Loss, MassiveToken, Part, PlaceRow, ScanResult
from melayer.census.rounding_error import KINDS
from melayer.evaluation.result import Change, Chosen, EvalResult, Score
from melayer.interventions.mask import WeMask
from melayer.measurements.criterion import Criterion
from melayer.measurements.explain.figures import (
    BudgetStep,
    Causes,
    Counterfactual,
    Direction,
    Driver,
    ExpertUse,
    Neuron,
    TextCauses,
)
from melayer.measurements.explain.result import ExplainResult, LayerExplanation
from melayer.measurements.locate.figures import (
    BlockRow,
    MassiveDim,
    MassiveScalar,
    Peak,
    SequenceRow,
    Stage,
    Trace,
)
from melayer.measurements.locate.result import LocateResult
from melayer.measurements.rigidity.result import EffectiveRank, RigidityResult
from melayer.measurements.sinks.result import MassiveKeys, SinkHead, SinksResult
from melayer.model.provenance import ModelInfo
from melayer.numerics import histogram
from melayer.numerics.paired import Comparison
from melayer.quantisation.result import (
    Difference,
    Elsewhere,
    InputRow,
    PerplexityScore,
    Prefix,
    QuantCheckResult,
    Setting,
)
from melayer.studies.answers.result import AnswerPair, AnswersResult
from melayer.studies.contrast.contrast import ContrastResult, Figure, Measured
from melayer.studies.sweep.result import SweepPoint, SweepResult
from melayer.tuning.result import TuneResult

HOSTILE = "[red]<b>:x:</b>[/]"
"""Markup for a page, for plotly and for a terminal, and the name of an emoji."""
MODEL = ModelInfo(name=HOSTILE, fingerprint="0123", dtype="float32", family="llama", n_layers=4, d_model=8)


# --- measurements -----------------------------------------------------------------------------------------------------


def located(*, name: str = HOSTILE, me_layer: int | None = 1) -> LocateResult:
    """Block 1 makes dimension 5 of token 0 massive, block 3 erases it; the second of two texts is too short to vote."""
    maxima = (2.0, 4000.0, 4100.5, 30.0)
    massive = (0, 1, 1, 0)
    blocks = tuple(
        BlockRow(
            layer=layer, max_abs=maxima[layer], sequence=0, token_index=0, token=HOSTILE, dim=5, median_abs=0.5,
            ratio=maxima[layer] / 0.5, top_norm=maxima[layer] + 1, others_norm=3.25, n_massive=massive[layer],
            n_holding=massive[layer], n_non_finite=0,
        )
        for layer in range(4)
    )  # fmt: skip
    shares = (
        Stage(0, 0.001, 0.0004, 0.0006),
        Stage(1, 0.96, -0.01, 0.97),
        Stage(2, 0.024, None, 0.02),
        Stage(3, -0.98, 0.0, -0.98),
    )
    states = np.zeros((4, 8), np.float32)
    states[:, 5] = maxima
    states[:, 1] = 1.0
    token_max = np.array([[2, 1], [4000, 2], [4100.5, 2], [30, 3]], np.float32)
    return LocateResult(
        model=ModelInfo(**{**MODEL.to_dict(), "name": name}),
        criterion=Criterion(),
        settings={
            "texts": "given",
            "n_sequences": 2,
            "n_tokens": 12,
            "bos": {"asked": None, "sequences_with_bos": 0},
        },
        me_layer=me_layer,
        emergence="single",
        stages=(shares[1],),
        erased_at=(3,),
        peak_layer=2,
        shares=shares,
        embedding_share=0.015,
        blocks=blocks,
        embedding_max_abs=0.8,
        massive=(MassiveScalar(1, 0, 0, HOSTILE, 5, -4000.0), MassiveScalar(2, 0, 0, HOSTILE, 5, -4100.5)),
        sequences=(
            SequenceRow(0, f"{HOSTILE} one", 9, 0, HOSTILE, False, True, True, 0, HOSTILE, "single"),
            SequenceRow(1, "two", 3, 0, "two", False, False, False, None, None, None),
        ),
        non_finite=None,
        notes=(f"A note on {HOSTILE}.",),
        trace=Trace(0, 0, HOSTILE, states, token_max, (HOSTILE, "one")),
        massive_dims=(MassiveDim(1, 5, 1, -4000.0), MassiveDim(2, 5, 1, -4100.5)),
        least_threshold=500.0,
        peak=None if me_layer is None else Peak(
            layer=2, sequence=0, token_index=0, token=HOSTILE, dim=5, max_abs=4100.5, me_share=0.96,
            standing_share=0.976, emergence="single", shares=shares, embedding_share=0.015, n_sequences=1,
            n_other_token=0, n_other_dim=0,
        ),
    )  # fmt: skip


def explained() -> ExplainResult:
    """Block 1's FFN alone writes the value, in two texts; one neuron of an expert most of it."""
    causes = Causes("ffn", -0.01, 1.01, 0.975, 0.0, None, 0.025)
    layer = LayerExplanation(
        layer=1, sequence=0, token_index=0, token=HOSTILE, d_star=5, value=-4000.0, value_in=-2.0, attn_write=40.0,
        ffn_write=-4038.0, causes=causes, norm="RMSNorm",
        budget=(
            BudgetStep("norm", 0.25, -0.5, 0.75),
            BudgetStep("gate and up", 2.0, 0.125, 1.875),
            BudgetStep("all", 2.25, -0.375, 2.625),
        ),
        attn_budget=(BudgetStep("values", 0.5, None, None),),
        neurons=(Neuron(17, 0.75, -3028.5, 2), Neuron(3, 0.2, -807.6, "shared")),
        bias_share=None, rest_share=0.05, super_weight=(1, 5, 17), super_weight_expert=2,
        drivers=(Driver("gate", 4, 12.5, 0.9, 1.5),),
        counterfactuals=(
            Counterfactual("gamma_flat_1.0", -3900.0, 0.975),
            Counterfactual("gamma_permuted", -2000.0, 0.5, -3000.0, -1500.0),
            Counterfactual("no_top_2", 1.0, -0.00025),
        ),
        interaction=0.1, directions=(Direction(0, 30.0, 0.9995),), experts=(ExpertUse(2, 0.625, 0.95),),
        texts=(
            TextCauses(0, 0, HOSTILE, 5, -4000.0, causes),
            TextCauses(1, 2, "two", 5, -3990.0, Causes("joint", None, 1.0, 0.4, 0.1, None, 0.5)),
        ),
        notes=(f"Its gamma is {HOSTILE}.",),
    )  # fmt: skip
    return ExplainResult(MODEL, {"layers": None}, 1, (layer,), ("A note.",))


def rigid() -> RigidityResult:
    """The state turns at block 0 and is erased at block 3; what attention reads of block 0 is not known."""
    ranks = [
        EffectiveRank(layer, site, with_massive, without, None, None)
        for layer, of_layer in enumerate([(None, 6.0), (1.5, 1.25), (1.25, 1.0), (5.0, 4.0)])
        for site, with_massive, without in (
            ("attn_in", of_layer[0], None if of_layer[0] is None else of_layer[0] + 4),
            ("block_out", of_layer[1], of_layer[1] + 3),
        )
    ]
    return RigidityResult(
        model=MODEL,
        settings={},
        me_layer=1,
        erased_at=(3,),
        n_sequences=2,
        cosine_next=(0.25, 0.9999, 0.125),
        cosine_peak=(0.25, 0.9999, 1.0, 0.125),
        cosine_inputs=(0.5, 0.75, 0.8, None),
        cosine_inputs_massive=(0.6, 0.99, 0.999, None),
        fixed_first_token=False,
        n_first_tokens=8,
        n_massive_first_tokens=6,
        effective_rank=tuple(ranks),
        tokens=12.0,
        n_rank_sequences=2,
        notes=(f"A note on {HOSTILE}.",),
    )


def sunk(**changes: Any) -> SinksResult:
    """Two heads a block, block 2 without softmax attention; one massive token is not the first."""
    values: dict[str, Any] = {
        "model": MODEL,
        "settings": {},
        "T": 16,
        "epsilon": 0.3,
        "key": 0,
        "n_sequences": 4,
        "me_layer": 1,
        "alpha": ((0.125, 0.0625), (0.25, None), None, (0.5, 0.875)),
        "rate": 0.3,
        "rate_by_layer": (0.0, 0.125, None, 0.75),
        "rate_until_me": 0.0625,
        "rate_after_me": 0.75,
        "heads": (SinkHead(3, 1, 0.875, 1.0), SinkHead(3, 0, 0.5, 0.75)),
        "massive": MassiveKeys(5, 1, ((0.1, 0.2), (0.3, 0.4), (None, None), (0.5, 0.6)), 0.5, 0.8),
        "notes": (f"A note on {HOSTILE}.",),
    }
    return SinksResult(**{**values, **changes})


# --- studies ----------------------------------------------------------------------------------------------------------


def _point(selector: str | None, rate: float, perplexity: float, sinks: float, cosine: float | None) -> SweepPoint:
    nll = 15 * math.log(perplexity)
    return SweepPoint(
        selector=selector,
        rate=rate,
        perplexity=perplexity,
        sink_rate=sinks / 2,
        sink_rate_after_me=sinks,
        sink_rate_by_layer=(0.0, 0.125, None, sinks),
        alpha=((0.125, 0.0625), (0.25, 0.25), None, (sinks, sinks / 2)),
        cosine_next=(0.25, cosine, 0.125),
        cosine_peak=(0.25, cosine, 1.0, 0.125),
        cosine_rigid=cosine,
        rank_attn_in=1.5,
        rank_attn_in_without=5.5,
        rank_block_out=None,
        rank_block_out_without=None,
        perplexity_low=0.9 * perplexity,
        perplexity_high=1.125 * perplexity,
        nll_by_sequence=tuple(nll + step * sinks for step in (-3.0, -1.0, 1.0, 3.0)),
    )


def swept() -> SweepResult:
    """The plain model and three masks; the mildest of `weight` halves the sinks."""
    return SweepResult(
        model=MODEL,
        settings={"layers": None, "strength": 1.0},
        me_layer=1,
        T=16,
        epsilon=0.3,
        n_sequences=4,
        plain=_point(None, 0.0, 10.0, 0.8, 0.9999),
        masked=(
            _point("weight", 0.5, 10.25, 0.4, 0.995),
            _point("weight", 1.0, 1234.5, 0.1, None),
            _point("random", 0.5, 10.0, 0.8, 0.99991),
        ),
        notes=(f"A note on {HOSTILE}.",),
        located=located(),
    )


def contrasted(*, after_me: int | None = 1) -> ContrastResult:
    """Before with, after with fewer sinks."""
    before = Measured(located(), rigid(), sunk(), {}, None)
    after = Measured(
        located(name="after", me_layer=after_me),
        RigidityResult(**{**vars(rigid()), "me_layer": after_me}),
        sunk(rate_by_layer=(0.0, 0.0, None, 0.25)),
        {},
        None,
    )
    figures = (
        Figure("ME layer", 1, after_me),
        Figure("largest |h|", 4100.5, 4100.5),
        Figure("in dimension", 5, 5),
        Figure("sink rate after block 1", 0.75, 0.25),
    )
    return ContrastResult(before, after, 16, figures, (f"A note on {HOSTILE}.",))


def answered() -> AnswersResult:
    """One answer that the mask leaves as it is, and one that it changes."""
    mask = WeMask(rate=0.5, me_layer=1, layers=(2, 3, 5))
    return AnswersResult(
        MODEL,
        {},
        mask,
        (AnswerPair(HOSTILE, 3, "yes", "yes", None), AnswerPair("Why?", 2, f"because {HOSTILE}", "no", 1)),
    )


# --- scans, quantisation, evaluation, training ------------------------------------------------------------------------


def _place(site: str, layer: int | None, max_abs: float | None, **changes: Any) -> PlaceRow:
    values: dict[str, Any] = {
        "site": site,
        "layer": layer,
        "max_abs": max_abs,
        "value": max_abs,
        "interval": None if max_abs is None else (max_abs / 2, max_abs),
        "document": 3,
        "window": 0,
        "token_index": 0,
        "token": HOSTILE,
        "dim": 5,
        "n_values": 1000,
        "mean": 0.125,
        "variance": 4.0,
        "kurtosis": 30.0,
        "quantiles": {"0.5": 0.25, "0.9999": 8.0},
        "beyond_fp16": 0,
        "top_dims": ((5, max_abs),),
    }
    return PlaceRow(**{**values, **changes})


def _census() -> Census:
    """Of each block's output 999 values of about 1/4, and one of 4,096."""
    places = tuple(Place("block_out", layer) for layer in range(2))
    census = Census.empty(places, [8, 8], n_layers=4, vocabulary=9)
    for row in census.counts:
        np.add.at(row, histogram.bins_of(np.array([0.3, 4100.0], np.float32)), [999, 1])
    return census


def scanned(*, formats: tuple[str, ...] = ("int8",)) -> ScanResult:
    """Two blocks; the second's output would overflow float16 in two values; one category has a hostile name."""
    losses = tuple(
        Loss(variant, "attn_in", layer, format, kind, error + 0.01 * layer)
        for format in formats
        for variant in ("plain", "masked")
        for layer in range(2)
        for kind, error in zip(KINDS, (0.5, 0.02, 0.3, 0.04, 0.01), strict=True)
    )
    part = Part(
        name="all",
        documents=1200,
        sequences=1300,
        voting=1250,
        tokens=20000,
        me_layer=1,
        holding=(0, 1250),
        n_massive=(0, 1300),
        places=(
            _place("embedding", None, 0.5),
            _place("block_out", 0, 2.0),
            _place("block_out", 1, 70000.0, beyond_fp16=2),
        ),
        massive=(MassiveToken(7, HOSTILE, "delimiter", 600, 100, 800, 1000), MassiveToken(8, "w", "word", 0, 1, 2, 3)),
        n_massive_first=900,
        n_massive_delimiters=300,
        n_massive_words=100,
        losses=losses,
        growth={"block_out": ((1, 100.0), (600, 35000.0), (1200, 70000.0)), "embedding": ((1, 0.5),)},
        census=_census(),
    )
    category = Part(**{**vars(part), "name": HOSTILE, "documents": 10, "sequences": 11, "tokens": 120, "losses": ()})
    return ScanResult(
        model=MODEL,
        criterion=Criterion(),
        settings={
            "data": {"source": "corpus.jsonl", "bytes": 5000, "files": 2},
            "max_tokens": 16,
            "mask": None,
            "formats": list(formats),
        },
        total=part,
        categories=(category,),
        left_out=(),
        n_left_out=0,
        seconds=12.5,
        n_processes=2,
        notes=(f"A note on {HOSTILE}.",),
    )


def quantised(*, formats: tuple[str, ...] = ("int8", "int4")) -> QuantCheckResult:
    """One scale a tensor; baking gives back what is lost, and int4 is not finite without it."""
    rows = []
    for format in formats:
        broken = format == "int4"
        plain = PerplexityScore(None, None, ()) if broken else PerplexityScore(3.0, 20.09, (3.0,))
        cost = None if broken else Difference(1.0, 0.5, 1.5)
        gain = None if broken else Difference(-0.75, -1.0, -0.5)
        rows += [
            Setting(format, "per-tensor", "plain", plain, cost, None, None, (0.5, None), (0.1, 0.1)),
            Setting(
                format, "per-tensor", "baked", PerplexityScore(2.25, 9.49, (2.25,)), Difference(0.25, None, None), gain,
                None,
                (0.01, 0.125), (0.1, 0.1),
            ),
        ]  # fmt: skip
    return QuantCheckResult(
        model=MODEL,
        settings={
            "texts": "given",
            "calibration": "given",
            "mask": {"selector": "weight", "rate": 0.5, "strength": 1.0},
            "left_unquantised": "the head",
            "formats": list(formats),
            "treatments": ["plain", "baked"],
            "level": 0.95,
        },
        me_layer=1,
        T=16,
        n_sequences=4,
        n_calibration=3,
        n_predicted=56,
        prefix=Prefix((7,), (HOSTILE,), (True,)),
        elsewhere={"calibration": Elsewhere(0, 45), "evaluation": Elsewhere(1, 60)},
        unquantised=PerplexityScore(2.0, 7.39, (2.0,)),
        unquantised_mask=PerplexityScore(2.0, 7.4, (2.0,)),
        inputs=(InputRow(0, ("self_attn.q_proj",), 8), InputRow(1, (HOSTILE,), 8)),
        rows=tuple(rows),
        notes=(f"A note on {HOSTILE}.",),
        linear_inputs=(),
        calibrated={},
        baked={},
    )


def evaluated(*, compared: bool = True) -> EvalResult:
    """A variant with a hostile name that wins two items and loses one, and is worse in perplexity."""
    accuracy = Comparison(40, 0.5, 0.525, 0.025, -0.05, 0.1, 0.95, 2, 1, 37, 1.0, "mcnemar", 1.0)
    losses = Comparison(9, -2.0, -2.5, -0.5, -0.75, -0.25, 0.95, 0, 9, 0, 0.004, "flips", 0.008)
    changes = (
        Change("gsm8k", "exact_match", HOSTILE, "plain", "mean", True, accuracy),
        Change("wikitext2", "word_perplexity", HOSTILE, "plain", "word_perplexity", True, losses),
    )
    scores = [
        Score("gsm8k", "exact_match", variant, value, value - 0.15, value + 0.15, 40, "mean", True, 4)
        for variant, value in (("plain", 0.5), (HOSTILE, 0.525))
    ]
    scores += [
        Score("wikitext2", "word_perplexity", variant, value, None, None, 9, "word_perplexity", True)
        for variant, value in (("plain", 7.389), (HOSTILE, 12.1825))
    ]

    def answer(output: str, right: float) -> dict[str, Any]:
        return {"prompt": "hash", "output": output, "scores": {"exact_match": [right, 1.0]}}

    answers = {
        "plain": {"gsm8k/0": answer("no", 0.0), "gsm8k/1": answer("yes", 1.0), "gsm8k/2": answer("no", 0.0)},
        HOSTILE: {"gsm8k/0": answer(HOSTILE, 1.0), "gsm8k/1": answer("no", 0.0), "gsm8k/2": answer("yes", 1.0)},
    }
    about = {"cite": "Cobbe 2021", "lm_eval_tasks": {"gsm8k": "3.0"}, "data_sha256": {"test.jsonl": "ab" * 32}}
    return EvalResult(
        settings={
            "shared": {
                "model": MODEL.to_dict(), "chat": False, "batch_size": 8, "device": "cpu", "versions": {"torch": "2"},
            },
            "tasks": {"gsm8k": about},
            "variants": {},
        },
        scores=tuple(scores if compared else scores[::2]),
        changes=changes if compared else (),
        notes=(f"A note on {HOSTILE}.",),
        chosen=(),
        answers={"gsm8k": answers},
        prompts={"hash": f"How many {HOSTILE}?"},
    )  # fmt: skip


def chosen(*, same_items: bool = False) -> EvalResult:
    """The same, where the variant was chosen on other items (or on the same)."""
    result = evaluated()
    one = Chosen("gsm8k", "exact_match", HOSTILE, 20, 0.6, same_items, result.changes[0])
    return EvalResult(**{**vars(result), "chosen": (one,)})


def tuned() -> tuple[TuneResult, list[dict[str, Any]]]:
    """Three logged steps of sft under a mask with two evaluations, and the log's lines."""
    history = [
        {"step": 0, "eval_loss": 3.5, "eval_runtime": 1.0},
        {"step": 1, "loss": 4.0, "grad_norm": 2.0},
        {"step": 2, "loss": 3.0, "grad_norm": None},
        {"step": 3, "loss": 2.5, "grad_norm": 1.0},
        {"step": 3, "eval_loss": 2.75, "eval_runtime": 1.0},
    ]
    result = TuneResult(
        method="sft",
        out="tuned",
        model=MODEL,
        mask=WeMask(rate=0.5, me_layer=1, layers=(2, 3)),
        reference=None,
        adapter=True,
        steps=3,
        first={"loss": 4.0},
        last={"loss": 2.5},
        validation=({"step": 0, "eval_loss": 3.5}, {"step": 3, "eval_loss": 2.75}),
        resumed_from=None,
        seconds=1.0,
        settings={"data": {"source": HOSTILE, "rows": 12, "sha256": "cd" * 32}},
        versions={"trl": "1.16"},
        notes=(f"A note on {HOSTILE}.",),
    )
    return result, history
