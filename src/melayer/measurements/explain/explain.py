"""Why the massive activation is there: norms along the branch, neurons, and the block run again without a part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import nn

from melayer.data.rows import Batch, Row, encode
from melayer.data.texts import builtin_texts
from melayer.errors import InputError
from melayer.measurements.criterion import STAGE_SHARE, Criterion
from melayer.measurements.explain.causes import (
    MAJORITY,
    BlockOnText,
    attn_budget,
    counterfactuals,
    directions,
    drivers,
    experts,
    ffn_budget,
    interaction,
)
from melayer.measurements.explain.result import (
    ExplainResult,
    LayerExplanation,
    Neuron,
    TextCauses,
)
from melayer.measurements.locate.locate import locate
from melayer.measurements.locate.result import LocateResult
from melayer.model import hooks, wiring
from melayer.model.decoder import Decoder
from melayer.model.forward import forward
from melayer.model.isolated_block import BlockAlone, Called
from melayer.model.provenance import describe, require_same_model
from melayer.runs.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def explain(
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
        parts: Names of parts that `architecture.read` does not find by itself.
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
    for option, given in (("seeds", seeds), ("top", top), ("max_texts", max_texts)):
        if given < 1:
            raise InputError(f"{option} is {given}; expected at least 1.")
    builtin = texts is None
    texts = builtin_texts() if texts is None else texts
    decoder = wiring.read(model, parts=parts)
    for layer in layers or ():
        if not 0 <= layer < decoder.n_layers:
            raise InputError(
                f"Layer {layer} was asked for, but the model has blocks 0 to {decoder.n_layers - 1}. "
                f"Give layers in that range, counted from 0."
            )
    info = describe(decoder, name)
    halfway = False
    if located is None:
        located = locate(
            model,
            tokenizer,
            texts=texts,
            max_tokens=max_tokens,
            bos=bos,
            criterion=criterion,
            max_batch_tokens=max_batch_tokens,
            parts=parts,
            name=name,
            # Half of the way: what follows costs about as much, and how much is known only then.
            progress=None if progress is None else lambda done, total: progress(done, 2 * total),
        )
        halfway = True
    elif criterion not in (None, located.criterion):
        raise InputError("The located result has another criterion than the one given. Give one of them only.")
    bos = located.settings["bos"]["asked"] if bos is None else bos
    max_tokens = located.settings["max_tokens"] if max_tokens is None else max_tokens
    rows = encode(tokenizer, texts, max_tokens=max_tokens, max_positions=decoder.max_positions, bos=bos)
    same = [(row.n_tokens, row.first_token, row.text[:79]) for row in located.sequences] == [
        (len(row), row.tokens[0], row.text[:79]) for row in rows
    ]
    other = (
        "The located result is of another model or of other texts. Give the same model, texts, bos and max_tokens "
        "as to locate, or leave `located` out."
    )
    require_same_model(located.model.fingerprint, info.fingerprint, other)
    if not same:
        raise InputError(other)
    wanted = _wanted(layers, located)
    chosen = _chosen(located, rows, max_texts)
    notes, found = [], {layer: list[BlockOnText]() for layer in wanted}
    steps = len(chosen) + len(wanted)
    tokens = sum(map(len, rows))

    def report(step: int) -> None:
        if progress is not None:
            done = tokens * step // steps if steps else tokens
            progress(tokens + done if halfway else done, 2 * tokens if halfway else tokens)

    for place, row in enumerate(chosen if wanted else [], start=1):
        for alone in _record(decoder, row, wanted):
            token = located.sequences[row.index].massive_token_index
            text = BlockOnText.read(decoder, alone, row, token)
            if text is None:
                notes.append(
                    f"Block {alone.block.layer} is not finite in text {row.index}, and is not explained there."
                )
            else:
                found[alone.block.layer].append(text)
        report(place)
    explained = []
    for place, read in enumerate(found.values(), start=1):
        if read:
            explained.append(_explained(read, seeds, top))
        report(len(chosen) + place)
    return ExplainResult(
        model=info,
        settings={
            "texts": "built-in" if builtin else "given",
            "n_sequences": len(rows),
            "n_tokens": sum(map(len, rows)),
            "max_tokens": max_tokens,
            "bos": located.settings["bos"],
            "criterion": asdict(located.criterion),
            "layers": None if layers is None else wanted,
            "sequences": [row.index for row in chosen],
            "seeds": seeds,
            "top": top,
            "max_texts": max_texts,
            "majority": MAJORITY,
            "stage_share": STAGE_SHARE,
            "layers_counted_from": 0,
        },
        me_layer=located.me_layer,
        layers=tuple(explained),
        notes=tuple(notes),
    )


def _wanted(layers: Sequence[int] | None, located: LocateResult) -> list[int]:
    if layers is not None:
        return sorted(set(layers))
    if located.me_layer is None:
        return []
    return sorted({located.me_layer, *(stage.layer for stage in located.stages)})


def _chosen(located: LocateResult, rows: Sequence[Row], max_texts: int) -> list[Row]:
    """The first texts that vote and in which the massive token holds; without an ME layer, those that vote."""
    voting = [row for row in located.sequences if row.votes and row.holds is not False]
    return [rows[row.index] for row in voting[:max_texts]]


def _record(decoder: Decoder, row: Row, layers: Sequence[int]) -> list[BlockAlone]:
    """The blocks with what the model calls them with on one row."""
    called: dict[int, Called] = {}
    ids = torch.tensor([row.ids])
    modules = [(layer, decoder.blocks[layer].module) for layer in layers]
    with hooks.record_arguments(modules, lambda layer, args, kwargs: called.update({layer: (args, kwargs)})):
        forward(decoder.model, Batch((row,), ids, torch.ones_like(ids)))
    return [BlockAlone(decoder.model, decoder.blocks[layer], *called[layer]) for layer in layers]


# --- the explanation -----------------------------------------------------------------------------------------------


def _explained(texts: Sequence[BlockOnText], seeds: int, top: int) -> LayerExplanation:
    first = texts[0]
    block = first.block
    heaviest = first.contributions()
    total = sum(value for value, _, _ in heaviest)
    bias = 0.0
    if first.neurons is not None:
        bias = sum(float(part.bias[first.dim]) for part in first.neurons.parts if part.bias is not None)
    total += bias
    notes = []
    if len(first.row) == 1:
        notes.append("The text has one token, so there are no others to compare it with.")
    if block.ffn is not None and first.neurons is None:
        notes.append(
            f"The neurons of {type(block.ffn.module).__name__} are not known: what they would write is not its output."
        )
    if block.ffn is not None and first.neurons is not None and not total:
        notes.append(f"The FFN writes nothing into dimension {first.dim}, so no neuron has a share of it.")
    if block.attention is None:
        notes.append("This block mixes tokens without softmax attention, so there is no budget of attention.")
    neurons = tuple(Neuron(j, value / total, value, expert) for value, expert, j in heaviest[:top]) if total else ()
    run = tuple(counterfactuals(first, seeds))
    causes = [text.causes() for text in texts]
    norm = block.ffn_norm
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
        causes=causes[0],
        norm=None if norm is None else "LayerNorm" if isinstance(norm.module, nn.LayerNorm) else "RMSNorm",
        budget=ffn_budget(first),
        attn_budget=attn_budget(first),
        neurons=neurons,
        bias_share=bias / total if total and first.neurons else None,
        rest_share=sum(value for value, _, _ in heaviest[top:]) / total if total else None,
        super_weight=(block.layer, first.dim, heaviest[0][2]) if neurons else None,
        super_weight_expert=neurons[0].expert if neurons else None,
        drivers=drivers(first) if neurons else (),
        counterfactuals=run,
        interaction=interaction(run),
        directions=directions(first) if neurons else (),
        experts=experts(first, total),
        texts=tuple(
            TextCauses(
                sequence=text.row.index,
                token_index=text.token,
                token=text.row.tokens[text.token],
                dim=text.dim,
                value=text.at("block_out"),
                causes=cause,
            )
            for text, cause in zip(texts, causes, strict=True)
        ),
        notes=tuple(notes),
    )
