"""Why the massive activation is there: norms along the branch, neurons, and the block run again without a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from melayer.data.rows import Row, bos_note
from melayer.errors import InputError
from melayer.measurements.criterion import STAGE_SHARE, Criterion
from melayer.measurements.explain.block_on_text import BlockOnText, record_blocks
from melayer.measurements.explain.budget import attn_budget, ffn_budget
from melayer.measurements.explain.causes import MAJORITY, causes_of
from melayer.measurements.explain.counterfactuals import counterfactuals, interaction
from melayer.measurements.explain.figures import Neuron, TextCauses
from melayer.measurements.explain.result import ExplainResult, LayerExplanation
from melayer.measurements.explain.write import directions, drivers, experts
from melayer.measurements.locate.locate import locate_on
from melayer.measurements.locate.result import LocateResult
from melayer.measurements.locate.reuse import options_of, require_located_on
from melayer.measurements.settings import LAYERS_COUNTED_FROM, criterion_settings, text_settings
from melayer.model.decoder import Decoder
from melayer.model.subject import Subject
from melayer.presentation.numbers import number, share
from melayer.runs.progress import Bar, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def explain(  # noqa: PLR0913 - public: every option has a name
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    located: LocateResult | None = None,
    max_tokens: int | None = None,
    bos: bool | None = None,
    criterion: Criterion | None = None,
    seeds: int = 5,
    top: int = 10,
    max_texts: int = 4,
    max_batch_tokens: int = 2048,
    parts: Mapping[str, str] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> ExplainResult:
    """Why the massive activation is there: which part of which block creates it, and what is left without that part.

    Args:
        model: A causal language model from transformers. It is bit-identical afterwards.
        tokenizer: The model's.
        texts: What to run; by default a small varied set that melayer brings along.
        layers: The blocks to explain; by default the ME layer and every stage.
        located: What `locate` found on the same texts; by default it is run. Its `bos`, `max_tokens` and criterion
            hold here too.
        max_tokens: Tokens kept of each text; by default 512, or the model's positions if they are fewer.
        bos: Whether the begin-of-sequence token comes first; None leaves it to the tokenizer.
        criterion: Thresholds, persistence and majority of the massive activation.
        seeds: How many permutations of gamma to try.
        top: How many neurons to list.
        max_texts: In how many of the texts to ask for the causes; all other figures are of the first.
        max_batch_tokens: Tokens in one forward pass while locating; each text is explained alone.
        parts: Names of parts that `wiring.read` does not find by itself.
        name: What to call the model in the result.
        progress: Called with the tokens done and the tokens in all.

    Returns:
        The result, on the host. Without an ME layer and without `layers` it has no layers and says so.

    Raises:
        InputError: The texts or the options make no measurement, or `located` is of something else.
        ArchitectureError: A part of the model was not found, or a norm computes something else.

    Example:
        >>> melayer.explain(model, tokenizer).layers[0].causes.attribution  # doctest: +SKIP
        'ffn'
    """
    return explain_on(
        Subject.of(model, tokenizer, parts=parts, name=name),
        texts=texts,
        layers=layers,
        located=located,
        max_tokens=max_tokens,
        bos=bos,
        criterion=criterion,
        seeds=seeds,
        top=top,
        max_texts=max_texts,
        max_batch_tokens=max_batch_tokens,
        progress=progress,
    )


def explain_on(  # noqa: PLR0913 - the options of the public function
    subject: Subject,
    *,
    texts: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    located: LocateResult | None = None,
    max_tokens: int | None = None,
    bos: bool | None = None,
    criterion: Criterion | None = None,
    seeds: int = 5,
    top: int = 10,
    max_texts: int = 4,
    max_batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> ExplainResult:
    """As `explain`, on a model that was read already."""
    for option, value in (("seeds", seeds), ("top", top), ("max_texts", max_texts)):
        if value < 1:
            raise InputError(f"{option} is {value}; expected at least 1.")
    _check_layers(layers, subject.decoder.n_layers)
    max_tokens, bos = options_of(located, criterion=criterion, max_tokens=max_tokens, bos=bos)
    rows = subject.rows(texts, max_tokens=max_tokens, bos=bos)
    n_tokens = sum(map(len, rows))
    # What follows `locate` costs about as much.
    bar = Bar(progress, n_tokens * (2 if located is None else 1))
    if located is None:
        located = locate_on(
            subject,
            texts=texts,
            max_tokens=max_tokens,
            bos=bos,
            criterion=criterion,
            max_batch_tokens=max_batch_tokens,
            progress=bar.part(n_tokens),
        )
    require_located_on(located, subject.info, rows)
    wanted = _wanted(layers, located)
    chosen = _chosen(located, rows, max_texts)
    report = _steps(bar.part(n_tokens), len(chosen) + len(wanted))
    by_layer, notes = _read(subject.decoder, located, chosen if wanted else (), wanted, report)
    notes = [*filter(None, [bos_note(rows)]), *notes]
    explained = []
    for on_texts in by_layer.values():
        if on_texts:
            explained.append(_explained(on_texts, seeds, top))
        report()
    return ExplainResult(
        model=subject.info,
        settings={
            **text_settings(rows, texts, max_tokens, bos),
            "criterion": criterion_settings(located.criterion),
            "layers": None if layers is None else wanted,
            "sequences": [row.index for row in chosen],
            "seeds": seeds,
            "top": top,
            "max_texts": max_texts,
            "majority": MAJORITY,
            "stage_share": STAGE_SHARE,
            "layers_counted_from": LAYERS_COUNTED_FROM,
        },
        me_layer=located.me_layer,
        layers=tuple(explained),
        notes=(*notes, *_notes_on_peak(located, wanted)),
    )


def _notes_on_peak(located: LocateResult, wanted: Sequence[int]) -> Iterator[str]:
    """That the ME layer's block, if it is explained, is not where the massive activation emerges."""
    peak = located.peak
    if peak is not None and located.me_layer in wanted and peak.me_share < STAGE_SHARE:
        stages = [str(stage.layer) for stage in peak.shares if stage.share >= STAGE_SHARE]
        where = f"; blocks that add 10% or more: {', '.join(stages)}" if stages else ""
        yield (
            f"Block {located.me_layer} is the ME layer by definition, but adds {share(peak.me_share)} of the peak "
            f"(block {peak.layer}, dimension {peak.dim}, {number(peak.max_abs)}){where}."
        )


def _check_layers(layers: Sequence[int] | None, n_layers: int) -> None:
    for layer in layers or ():
        if not 0 <= layer < n_layers:
            raise InputError(
                f"Layer {layer} was asked for, but the model has blocks 0 to {n_layers - 1}. "
                f"Give layers in that range, counted from 0."
            )


def _steps(progress: Progress | None, total: int) -> Callable[[], None]:
    """What to call after each of the steps."""
    done = 0

    def report() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return report


# --- what to explain -------------------------------------------------------------------------------------------------


def _wanted(layers: Sequence[int] | None, located: LocateResult) -> list[int]:
    """The blocks to explain."""
    if layers is not None:
        return sorted(set(layers))
    if located.me_layer is None:
        return []
    return sorted({located.me_layer, *(stage.layer for stage in located.stages)})


def _chosen(located: LocateResult, rows: Sequence[Row], max_texts: int) -> list[Row]:
    """The first texts that vote and in which the massive token holds; without an ME layer, those that vote."""
    voting = [row for row in located.sequences if row.votes and row.holds is not False]
    return [rows[row.index] for row in voting[:max_texts]]


def _read(
    decoder: Decoder,
    located: LocateResult,
    rows: Sequence[Row],
    layers: Sequence[int],
    report: Callable[[], None],
) -> tuple[dict[int, list[BlockOnText]], list[str]]:
    """Each block on each of the texts where it is finite, by the block's number; and notes of where it is not."""
    by_layer: dict[int, list[BlockOnText]] = {layer: [] for layer in layers}
    notes = []
    for row in rows:
        for alone in record_blocks(decoder, row, layers):
            layer = alone.block.layer
            text = BlockOnText.read(decoder, alone, row, located.sequences[row.index].massive_token_index)
            if text is None:
                notes.append(f"Block {layer} is not finite in text {row.index}, and is not explained there.")
            else:
                by_layer[layer].append(text)
        report()
    return by_layer, notes


# --- the explanation -----------------------------------------------------------------------------------------------


def _explained(texts: Sequence[BlockOnText], seeds: int, top: int) -> LayerExplanation:
    """Why one block has its value: in the first text, and the causes in each."""
    first = texts[0]
    block = first.block
    heaviest = first.contributions()
    bias = first.bias()
    total = sum(value for value, _, _ in heaviest) + bias
    neurons = tuple(Neuron(j, value / total, value, expert) for value, expert, j in heaviest[:top]) if total else ()
    rows = tuple(counterfactuals(first, seeds))
    on_texts = tuple(_on_text(text) for text in texts)
    return LayerExplanation(
        layer=block.layer,
        sequence=first.row.index,
        token_index=first.token,
        token=first.row.tokens[first.token],
        d_star=first.dim,
        value=first.at("block_out"),
        value_in=first.at("block_in"),
        attn_write=first.at("attn_out"),
        ffn_write=first.at("ffn_out") if block.ffn else None,
        causes=on_texts[0].causes,
        norm=_kind_of_norm(first),
        budget=ffn_budget(first),
        attn_budget=attn_budget(first),
        neurons=neurons,
        bias_share=bias / total if total and first.neurons else None,
        rest_share=sum(value for value, _, _ in heaviest[top:]) / total if total else None,
        super_weight=(block.layer, first.dim, neurons[0].neuron) if neurons else None,
        super_weight_expert=neurons[0].expert if neurons else None,
        drivers=drivers(first) if neurons else (),
        counterfactuals=rows,
        interaction=interaction(rows),
        directions=directions(first) if neurons else (),
        experts=experts(first, total),
        texts=on_texts,
        notes=tuple(_notes(first, total)),
    )


def _on_text(text: BlockOnText) -> TextCauses:
    return TextCauses(
        sequence=text.row.index,
        token_index=text.token,
        token=text.row.tokens[text.token],
        dim=text.dim,
        value=text.at("block_out"),
        causes=causes_of(text),
    )


def _kind_of_norm(text: BlockOnText) -> str | None:
    norm = text.block.ffn_norm
    if norm is None:
        return None
    return "LayerNorm" if isinstance(norm.module, nn.LayerNorm) else "RMSNorm"


def _notes(text: BlockOnText, total: float) -> Iterator[str]:
    """What is missing from the explanation; `total` is the FFN's output in the dimension."""
    block = text.block
    if len(text.row) == 1:
        yield "The text has one token, so there are no others to compare it with."
    if block.ffn is not None and text.neurons is None:
        kind = type(block.ffn.module).__name__
        yield f"The neurons of {kind} are not known: what they would write is not its output."
    if block.ffn is not None and text.neurons is not None and not total:
        yield f"The FFN writes nothing into dimension {text.dim}, so no neuron has a share of it."
    if block.attention is None:
        yield "This block mixes tokens without softmax attention, so there is no budget of attention."
