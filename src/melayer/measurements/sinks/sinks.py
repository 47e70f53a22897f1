"""Which keys draw the attention: the sink rate, by block and head, before and after the ME layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from melayer.data.rows import Batch, Row, batches, bos_note
from melayer.errors import InputError
from melayer.measurements.criterion import Criterion, find_me_layer
from melayer.measurements.settings import LAYERS_COUNTED_FROM, criterion_settings, window_settings
from melayer.measurements.sinks.result import MassiveKeys, SinkHead, SinksResult
from melayer.measurements.summaries import SequenceSummary, holding_of, summaries_of
from melayer.model import attention
from melayer.model.decoder import Decoder
from melayer.model.forward import forward
from melayer.model.hooks import measuring
from melayer.model.subject import Subject
from melayer.runs.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def sinks(  # noqa: PLR0913 - public: every option has a name
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    T: int = 64,
    epsilon: float = 0.3,
    texts: Sequence[str] | None = None,
    bos: bool | None = None,
    criterion: Criterion | None = None,
    max_batch_tokens: int = 2048,
    parts: Mapping[str, str] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> SinksResult:
    """How much attention the first token and the massive tokens draw, for every block and head.

    alpha_k is the mean of A[t, k] over the queries t >= k; a head is a sink head for key k where alpha_k > epsilon;
    the sink rate is the share of (sequence, layer, head) that are (Gu et al. 2024, arXiv:2410.10781). It falls with
    the length of the sequences, so all have the same T. No [T, T] matrix is built.

    Args:
        model: A causal language model from transformers. It is bit-identical afterwards.
        tokenizer: The model's.
        T: Tokens in each sequence; 64 is the published setting.
        epsilon: The threshold; 0.3 is the published setting.
        texts: What to run, cut into sequences of T tokens; by default melayer's own.
        bos: Whether the begin-of-sequence token comes first; None leaves it to the tokenizer.
        criterion: What counts as massive, and as the ME layer.
        max_batch_tokens: Tokens in one forward pass.
        parts: Names of parts that `wiring.read` does not find by itself.
        name: What to call the model in the result.
        progress: Called with the tokens done and the tokens in all.

    Raises:
        InputError: T is beyond the texts or the model, an option is out of range, or the activations are not finite.
        ArchitectureError: The model has no softmax attention, or it cannot be listened to.

    Example:
        >>> melayer.sinks(model, tokenizer, T=64).rate_after_me  # doctest: +SKIP
    """
    return sinks_on(
        Subject.of(model, tokenizer, parts=parts, name=name),
        T=T,
        epsilon=epsilon,
        texts=texts,
        bos=bos,
        criterion=criterion,
        max_batch_tokens=max_batch_tokens,
        progress=progress,
    )


def sinks_on(
    subject: Subject,
    *,
    T: int = 64,
    epsilon: float = 0.3,
    texts: Sequence[str] | None = None,
    bos: bool | None = None,
    criterion: Criterion | None = None,
    max_batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> SinksResult:
    """As `sinks`, on a model that was read already."""
    criterion = criterion or Criterion()
    if not 0 <= epsilon <= 1:
        raise InputError(f"epsilon is {epsilon}; expected a share of attention between 0 and 1.")
    decoder = subject.decoder
    rows = subject.windows(texts, T, bos=bos)
    alphas, summaries = _first_keys(decoder, rows, criterion, max_batch_tokens, progress)
    _refuse_non_finite(decoder, rows, summaries)
    me_layer = find_me_layer(holding_of(rows, summaries).sum(axis=0), len(rows), criterion)
    softmax = [block.layer for block in decoder.blocks if block.attention is not None]
    is_sink = {layer: alphas[layer] > epsilon for layer in softmax}
    notes = [said] if (said := bos_note(rows)) else []
    if len(softmax) < decoder.n_layers:
        notes.append(f"{decoder.n_layers - len(softmax)} of {decoder.n_layers} blocks have no softmax attention.")
    if criterion.min_tokens > T:
        notes.append(f"With fewer than {criterion.min_tokens} tokens the criterion for the ME layer is not meaningful.")
    return SinksResult(
        model=subject.info,
        settings={
            "criterion": criterion_settings(criterion),
            **window_settings(rows, texts, bos),
            "layers_counted_from": LAYERS_COUNTED_FROM,
        },
        T=T,
        epsilon=epsilon,
        key=0,
        n_sequences=len(rows),
        me_layer=me_layer,
        alpha=tuple(
            tuple(alphas[layer].mean(axis=0).tolist()) if layer in is_sink else None
            for layer in range(decoder.n_layers)
        ),
        rate=_rate(is_sink, softmax) or 0.0,
        rate_by_layer=tuple(
            float(is_sink[layer].mean()) if layer in is_sink else None for layer in range(decoder.n_layers)
        ),
        rate_until_me=None if me_layer is None else _rate(is_sink, [layer for layer in softmax if layer <= me_layer]),
        rate_after_me=None if me_layer is None else _rate(is_sink, [layer for layer in softmax if layer > me_layer]),
        heads=_heads(alphas, is_sink),
        massive=_massive(decoder, rows, summaries, alphas, me_layer, epsilon, max_batch_tokens),
        notes=tuple(notes),
    )


def _first_keys(
    decoder: Decoder, rows: Sequence[Row], criterion: Criterion, max_batch_tokens: int, progress: Progress | None
) -> tuple[dict[int, NDArray[np.float32]], dict[int, SequenceSummary]]:
    """For each layer [n_sequences, n_heads] what key 0 draws, and the summaries of the same forward passes."""
    by_layer: dict[int, dict[int, NDArray[np.float32]]] = {}

    @contextmanager
    def listening(batch: Batch) -> Iterator[None]:
        with attention.listen(decoder, [[0]] * len(batch.rows), batch.attention_mask) as drawn:
            yield
            for layer, values in _on_host(drawn()).items():
                for place, row in enumerate(batch.rows):
                    by_layer.setdefault(layer, {})[row.index] = values[place, :, 0]

    passes = list(batches(rows, max_batch_tokens=max_batch_tokens))
    summaries = summaries_of(decoder, passes, criterion, k=1, progress=progress, during_batch=listening)
    return {layer: np.stack([of[row.index] for row in rows]) for layer, of in by_layer.items()}, summaries


def _refuse_non_finite(decoder: Decoder, rows: Sequence[Row], summaries: Mapping[int, SequenceSummary]) -> None:
    """A NaN is below every threshold: it would count as a head that is no sink."""
    for layer in range(decoder.n_layers):
        for row in rows:
            if summaries[row.index].n_non_finite[layer + 1]:
                raise InputError(
                    f"The activations are not finite from the output of block {layer} on (sequence {row.index}), so "
                    "attention after it cannot be measured. Load the model in a wider dtype, or see melayer locate."
                )


def _on_host(drawn: Mapping[int, torch.Tensor]) -> dict[int, NDArray[np.float32]]:
    return {layer: values.cpu().numpy() for layer, values in drawn.items()}


def _rate(is_sink: Mapping[int, NDArray[np.bool_]], layers: Sequence[int]) -> float | None:
    """The share of (sequence, layer, head) over these layers; None over none."""
    return float(np.concatenate([is_sink[layer].ravel() for layer in layers]).mean()) if layers else None


def _heads(alphas: Mapping[int, NDArray[np.float32]], is_sink: Mapping[int, NDArray[np.bool_]]) -> tuple[SinkHead, ...]:
    heads = [
        SinkHead(layer, head, float(alphas[layer][:, head].mean()), float(share))
        for layer, shares in ((layer, sink.mean(axis=0)) for layer, sink in is_sink.items())
        for head, share in enumerate(shares)
        if share > 0.5
    ]
    return tuple(sorted(heads, key=lambda head: -head.alpha))


def _massive(
    decoder: Decoder,
    rows: Sequence[Row],
    summaries: Mapping[int, SequenceSummary],
    first: Mapping[int, NDArray[np.float32]],
    me_layer: int | None,
    epsilon: float,
    max_batch_tokens: int,
) -> MassiveKeys | None:
    """What the massive tokens at the ME layer's output draw; only sequences with one beyond key 0 run again.

    Args:
        decoder: The model's parts.
        rows: The sequences.
        summaries: Of each.
        first: For each layer [n_sequences, n_heads] what key 0 draws.
        me_layer: The ME layer; without one there is nothing to ask for.
        epsilon: From where on a key is a sink.
        max_batch_tokens: Tokens in one forward pass.
    """
    if me_layer is None:
        return None
    tokens = {row.index: summaries[row.index].massive_at(me_layer) for row in rows}
    n_tokens = sum(map(len, tokens.values()))
    if not n_tokens:
        return None
    drawn_by = _Drawn(epsilon)
    for row in rows:
        if tokens[row.index] == [0]:
            for layer, values in first.items():
                drawn_by.add(layer, values[row.index : row.index + 1])
    again = [row for row in rows if any(token > 0 for token in tokens[row.index])]
    for batch in batches(again, max_batch_tokens=max_batch_tokens):
        keys = [tokens[row.index] for row in batch.rows]
        with measuring(decoder.model), attention.listen(decoder, keys, batch.attention_mask) as drawn:
            forward(decoder.model, batch)
            for layer, values in _on_host(drawn()).items():
                for place, of in enumerate(keys):
                    drawn_by.add(layer, values[place, :, : len(of)].T)
    return MassiveKeys(
        n_tokens=n_tokens,
        n_not_first=sum(token > 0 for of in tokens.values() for token in of),
        alpha=tuple(drawn_by.mean(layer) for layer in range(decoder.n_layers)),
        rate=drawn_by.rate(0) or 0.0,
        rate_after_me=drawn_by.rate(me_layer + 1),
    )


class _Drawn:
    """What keys draw, added up as they come: there may be hundreds in a sequence, and nothing is kept of one."""

    def __init__(self, epsilon: float) -> None:
        self._epsilon = epsilon
        self._sums: dict[int, NDArray[np.float64]] = {}
        self._sinks: dict[int, NDArray[np.int64]] = {}
        self._n: dict[int, int] = {}

    def add(self, layer: int, alphas: NDArray[np.float32]) -> None:
        """Adds [n_keys, n_heads] of one layer."""
        self._sums[layer] = self._sums.get(layer, np.zeros(alphas.shape[1])) + alphas.sum(axis=0, dtype=np.float64)
        self._sinks[layer] = self._sinks.get(layer, np.zeros(alphas.shape[1], np.int64)) + (alphas > self._epsilon).sum(
            axis=0
        )
        self._n[layer] = self._n.get(layer, 0) + len(alphas)

    def mean(self, layer: int) -> tuple[float, ...]:
        """[n_heads] the mean over the keys; empty for a layer without softmax attention."""
        return tuple((self._sums[layer] / self._n[layer]).tolist()) if layer in self._sums else ()

    def rate(self, start: int) -> float | None:
        """The share of (key, layer, head) that are sinks, from this layer on; None where there is no such layer."""
        sinks = {layer: of for layer, of in self._sinks.items() if layer >= start}
        n = sum(self._n[layer] * len(of) for layer, of in sinks.items())
        return float(sum(int(of.sum()) for of in sinks.values()) / n) if n else None
