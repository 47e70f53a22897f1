"""What the massive activation makes rigid: its token's state across blocks and inputs, and what attention reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from melayer.data.rows import Row, batches, encode, token_text
from melayer.data.texts import builtin_texts
from melayer.errors import InputError
from melayer.measurements.criterion import Criterion
from melayer.measurements.locate.locate import locate
from melayer.measurements.locate.result import LocateResult
from melayer.measurements.rigidity.result import EffectiveRank, RigidityResult
from melayer.model import hooks, wiring
from melayer.model.decoder import Decoder
from melayer.model.forward import embedding_weight, forward
from melayer.model.provenance import ModelInfo, describe, require_same_model
from melayer.runs.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MIN_RANK_TOKENS = 8
"""A shorter sequence says nothing about rank: it cannot exceed the number of tokens."""
# Rows of a fixed first token: later tokens cannot reach it, a few are enough to show that.
_FIXED_TOKENS = 16
# First tokens in one pass, so that their states at every block stay small beside the model.
_MOST_ROWS = 256


def rigidity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: Sequence[str] | None = None,
    n_first_tokens: int = 64,
    fixed_first_token: bool = False,
    seed: int = 0,
    located: LocateResult | None = None,
    max_tokens: int | None = None,
    bos: bool | None = None,
    criterion: Criterion | None = None,
    max_batch_tokens: int = 2048,
    parts: Mapping[str, str] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> RigidityResult:
    """How rigid the massive token's state is across blocks and inputs, and how diverse the tokens are beside it.

    Args:
        model: A causal language model from transformers. It is bit-identical afterwards.
        tokenizer: The model's.
        texts: What to run; by default a small varied set that melayer brings along.
        n_first_tokens: How many different first tokens to draw from the vocabulary, special ones left out.
        fixed_first_token: Measure the trivial case instead: the same first token (BOS, or that of text 0) in every
            text. The first token sees only itself, so its cosine over inputs is then 1 by causality.
        seed: Of the draw.
        located: What `locate` found on the same texts; by default it is run. Its `bos`, `max_tokens` and criterion
            hold here too.
        max_tokens: Tokens kept of each text; by default 512, or the model's positions if they are fewer.
        bos: Whether the begin-of-sequence token comes first in the texts; None leaves it to the tokenizer. The drawn
            first tokens stand alone, without it.
        criterion: Thresholds, persistence and majority of the massive activation.
        max_batch_tokens: Tokens in one forward pass, padding counted.
        parts: Names of parts that `architecture.read` does not find by itself.
        name: What to call the model in the result.
        progress: Called with the tokens done and the tokens in all.

    Returns:
        The result, on the host. Without a massive token it follows token 0 and says so.

    Raises:
        InputError: The texts or the options make no measurement, or `located` is of something else.
        ArchitectureError: A part of the model was not found.

    Example:
        >>> melayer.rigidity(model, tokenizer).cosine_next[12]  # doctest: +SKIP
    """
    texts_given = texts is not None
    texts = builtin_texts() if texts is None else texts
    if located is not None:
        if criterion not in (None, located.criterion):
            raise InputError("The located result has another criterion than the one given. Give one of them only.")
        bos = located.settings["bos"]["asked"] if bos is None else bos
        max_tokens = located.settings["max_tokens"] if max_tokens is None else max_tokens
    decoder = wiring.read(model, parts=parts)
    rows = encode(tokenizer, texts, max_tokens=max_tokens, max_positions=decoder.max_positions, bos=bos)
    if fixed_first_token:
        first, first_text = _fixed(tokenizer, rows, decoder)
    else:
        first, first_text = _drawn(tokenizer, decoder, n_first_tokens, seed), None
    passes = 1 if located is not None else 2
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
            progress=None if progress is None else lambda done, total: progress(done, 2 * total),
        )
    info = describe(decoder, name or located.model.name)
    _check_subject(located, info, rows)
    notes = _notes(located, tokenizer, rows, first, fixed_first_token)

    massive = _massive_tokens(located)
    followed = _followed(located)
    cosine_next, cosine_peak = _across_blocks(decoder, rows, followed, max_batch_tokens)
    inputs, inputs_massive, n_massive = _across_inputs(
        decoder, first, None if fixed_first_token else located.me_layer, located.criterion.min_abs, max_batch_tokens
    )
    counted = [row for row in rows if len(row) >= MIN_RANK_TOKENS and len(massive.get(row.index, ())) < len(row)]
    with_massive = [row for row in counted if row.index in massive]
    if len(counted) < len(rows):
        notes.append(
            f"Too short for an effective rank (fewer than {MIN_RANK_TOKENS} tokens, or all of them massive): "
            f"{len(rows) - len(counted)} of {len(rows)} texts."
        )
    if with_massive and len(with_massive) < len(counted):
        # With and without must be of the same sequences, or their difference would be that of the texts.
        notes.append(f"Effective ranks are over the {len(with_massive)} texts that have a massive token.")
    ranked = with_massive or counted

    def report(done: int) -> None:
        if progress is not None:
            total = sum(map(len, rows))
            progress((passes - 1) * total + done, passes * total)

    effective_rank = _ranks(decoder, ranked, massive, max_batch_tokens, report)
    report(sum(map(len, rows)))
    return RigidityResult(
        model=info,
        settings={
            "criterion": asdict(located.criterion),
            "texts": "given" if texts_given else "built-in",
            "n_sequences": len(rows),
            "n_tokens": sum(map(len, rows)),
            "max_tokens": max_tokens,
            "bos": {"asked": bos, "sequences_with_bos": sum(row.has_bos for row in rows)},
            "seed": seed,
            "first_tokens": "fixed" if fixed_first_token else "drawn, each alone at position 0, without BOS",
            "fixed_first_token": first_text,
            "layers_counted_from": 0,
        },
        me_layer=located.me_layer,
        erased_at=located.erased_at,
        n_sequences=len(followed),
        cosine_next=_plain(cosine_next),
        cosine_peak=_plain(cosine_peak),
        cosine_inputs=_plain(inputs),
        cosine_inputs_massive=_plain(inputs_massive),
        fixed_first_token=fixed_first_token,
        n_first_tokens=1 if fixed_first_token else len(first),
        n_massive_first_tokens=n_massive,
        effective_rank=effective_rank,
        tokens=float(np.median([len(row) for row in ranked])) if ranked else None,
        n_rank_sequences=len(ranked),
        notes=tuple(notes),
    )


# --- what to run ---------------------------------------------------------------------------------------------------


def _drawn(tokenizer: PreTrainedTokenizerBase, decoder: Decoder, n: int, seed: int) -> list[Row]:
    """Rows of one token each, all different, none special."""
    if n < 2:
        raise InputError(
            f"n_first_tokens is {n}; expected at least 2. With a fixed first token the cosine over inputs is 1 by "
            "causality: it sees only itself. Give at least 2, or ask for that case with fixed_first_token=True."
        )
    left_out = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    embedded = embedding_weight(decoder.model).shape[0]
    usable = sorted({token for token in tokenizer.get_vocab().values() if token < embedded} - left_out)
    if n > len(usable):
        raise InputError(
            f"n_first_tokens is {n}, but only {len(usable)} tokens of the vocabulary are not special. "
            f"Give at most {len(usable)}."
        )
    taken = np.random.default_rng(seed).choice(len(usable), size=n, replace=False)
    return [_row(place, (usable[at],)) for place, at in enumerate(taken)]


def _fixed(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], decoder: Decoder) -> tuple[list[Row], str]:
    """The beginning of every text behind the same first token, and that token's text."""
    if len(rows) < 2:
        raise InputError("A fixed first token is compared over texts, and there is only one. Give at least 2.")
    bos: int | None = tokenizer.bos_token_id
    token = rows[0].ids[0] if bos is None else bos
    length = min(_FIXED_TOKENS, decoder.max_positions or _FIXED_TOKENS)
    starts = [row.ids if row.ids[0] == token else (token, *row.ids) for row in rows]
    return [_row(place, ids[:length]) for place, ids in enumerate(starts)], token_text(tokenizer, token)


def _row(index: int, ids: tuple[int, ...]) -> Row:
    return Row(index=index, text="", ids=ids, tokens=(), n_dropped=0, has_bos=False)


def _check_subject(located: LocateResult, info: ModelInfo, rows: Sequence[Row]) -> None:
    require_same_model(
        located.model.fingerprint,
        info.fingerprint,
        f"The located result is of another model (fingerprint {located.model.fingerprint}, this one's is "
        f"{info.fingerprint}). Run locate on this model, or leave `located` out.",
    )
    if [(s.n_tokens, s.text[:79]) for s in located.sequences] != [(len(row), row.text[:79]) for row in rows]:
        raise InputError(
            f"The located result is of other texts ({len(located.sequences)} texts, {located.settings['n_tokens']} "
            f"tokens) than those given ({len(rows)} texts, {sum(map(len, rows))} tokens). Give the same texts, bos "
            "and max_tokens to both, or leave `located` out."
        )


def _notes(
    located: LocateResult,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    first: Sequence[Row],
    fixed: bool,
) -> list[str]:
    notes = list(located.notes)
    if located.non_finite is not None:
        notes.append(located.sentence)
    if located.me_layer is None:
        notes.append("There is no massive token to follow: the figures are of token 0 of each text.")
    if fixed:
        notes.append("The first token is fixed: its cosine over inputs is 1 by causality, whatever the model.")
    elif any(row.has_bos for row in rows):
        notes.append(
            f"The texts start with BOS ({token_text(tokenizer, int(tokenizer.bos_token_id or 0))}), which would be 1 "
            f"by causality over inputs: the {len(first)} first tokens drawn stand in its place, without it."
        )
    return notes


def _followed(located: LocateResult) -> dict[int, int]:
    """The token to follow in each sequence."""
    if located.me_layer is None:
        return {row.index: 0 for row in located.sequences}
    return {
        row.index: row.massive_token_index
        for row in located.sequences
        if row.holds and row.massive_token_index is not None
    }


def _massive_tokens(located: LocateResult) -> dict[int, set[int]]:
    """The tokens of each sequence that hold a massive scalar from the ME layer on."""
    if located.me_layer is None:
        return {}
    found = {sequence: {token} for sequence, token in _followed(located).items()}
    for scalar in located.massive:
        if scalar.layer >= located.me_layer:
            found.setdefault(scalar.sequence, set()).add(scalar.token_index)
    return found


# --- cosines -------------------------------------------------------------------------------------------------------


def _states(
    decoder: Decoder, rows: Sequence[Row], places: Mapping[int, int], max_batch_tokens: int
) -> Iterator[tuple[tuple[Row, ...], NDArray[np.float64]]]:
    """For each batch its rows, and [n_layers, batch, d_model] the state of one token of each at every block's output.

    Args:
        decoder: The model's parts.
        rows: The sequences to run.
        places: For each row's index, which token.
        max_batch_tokens: Tokens in one forward pass.
    """
    points = [(block.layer, block.sites["block_out"]) for block in decoder.blocks]
    for batch in batches(rows, max_batch_tokens=max_batch_tokens):
        seen: dict[int, torch.Tensor] = {}
        at = torch.tensor([places[row.index] for row in batch.rows])

        def see(layer: int, hidden: torch.Tensor, at: torch.Tensor = at, into: Any = seen) -> None:
            into[layer] = hidden[torch.arange(len(at), device=hidden.device), at.to(hidden.device)].float()

        with hooks.watch(points, see):
            forward(decoder.model, batch)
        # The host has float64 whatever the device, and 1 - 0.99999 is a difference of nearly equal numbers.
        yield batch.rows, _on_host([seen[layer] for layer, _ in points])


def _on_host(tensors: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    """Tensors of equal shape as one array with them in front: one copy, after the forward pass."""
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).cpu().numpy().astype(np.float64)


def _unit(states: NDArray[np.float64]) -> NDArray[np.float64]:
    """The states with norm 1; NaN where one has no direction."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(states / np.linalg.norm(states, axis=-1, keepdims=True))


def _across_blocks(
    decoder: Decoder, rows: Sequence[Row], followed: Mapping[int, int], max_batch_tokens: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[n_layers - 1] cosines between neighbouring blocks and [n_layers] to the peak state, means over sequences."""
    # A token sees only what is before it: cut behind it, and equal beginnings run once.
    sharing: dict[tuple[int, ...], int] = {}
    for sequence, token in followed.items():
        prefix = rows[sequence].ids[: token + 1]
        sharing[prefix] = sharing.get(prefix, 0) + 1
    prefixes = [_row(place, ids) for place, ids in enumerate(sharing)]
    ends = {row.index: len(row) - 1 for row in prefixes}
    to_next = np.zeros(decoder.n_layers - 1)
    to_peak = np.zeros(decoder.n_layers)
    for batch, states in _states(decoder, prefixes, ends, max_batch_tokens):
        peaks = np.nan_to_num(np.linalg.norm(states, axis=-1)).argmax(axis=0)
        units = _unit(states)
        for place, row in enumerate(batch):
            unit, weight = units[:, place], sharing[row.ids]
            to_next += weight * (unit[:-1] * unit[1:]).sum(axis=-1)
            to_peak += weight * (unit @ unit[peaks[place]])
    count = max(1, len(followed))
    return np.clip(to_next / count, -1, 1), np.clip(to_peak / count, -1, 1)


def _across_inputs(
    decoder: Decoder, rows: Sequence[Row], me_layer: int | None, min_abs: float, max_batch_tokens: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], int | None]:
    """[n_layers] mean pairwise cosines of the first token's state, the same for those massive, and how many are."""
    sums = np.zeros((2, decoder.n_layers, decoder.d_model))
    n_massive = 0
    limit = min(max_batch_tokens, _MOST_ROWS * max(map(len, rows)))
    for _, states in _states(decoder, rows, {row.index: 0 for row in rows}, limit):
        units = _unit(states)
        sums[0] += units.sum(axis=1)
        if me_layer is not None:
            massive = np.abs(states[me_layer]).max(axis=-1) > min_abs
            sums[1] += units[:, massive].sum(axis=1)
            n_massive += int(massive.sum())
    among = mean_pairwise_cosine(sums[1], n_massive)
    return mean_pairwise_cosine(sums[0], len(rows)), among, None if me_layer is None else n_massive


def mean_pairwise_cosine(unit_sum: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """The mean cosine over all pairs of n unit vectors from their sum [..., d] alone; NaN for fewer than two.

    ||sum||^2 is n ones and every pair twice, so no pair is ever formed.
    """
    if n < 2:
        return np.full(unit_sum.shape[:-1], np.nan)
    cosine: NDArray[np.float64] = np.clip((np.square(unit_sum).sum(axis=-1) - n) / (n * (n - 1)), -1, 1)
    return cosine


# --- effective rank ------------------------------------------------------------------------------------------------


def spectral_entropy(tokens: torch.Tensor) -> torch.Tensor:
    """The entropy in nats, a scalar on the device, of sigma_i^2 / sum sigma^2 of a matrix [tokens, d_model].

    Uncentred. NaN where an entry is not finite or all are zero.
    """
    # float64: a massive token's eigenvalue is 1e6 times the others', and float32 would drown them. MPS has none.
    wide = (tokens.cpu() if tokens.device.type == "mps" else tokens).double()
    finite = torch.isfinite(wide).all()
    wide = torch.where(finite, wide, torch.zeros_like(wide))
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=0)
    entropy: torch.Tensor = torch.special.entr(eigenvalues / eigenvalues.sum()).sum()  # 0 / 0 is the NaN promised
    return entropy


def _ranks(
    decoder: Decoder,
    rows: Sequence[Row],
    massive: Mapping[int, set[int]],
    max_batch_tokens: int,
    report: Callable[[int], None],
) -> tuple[EffectiveRank, ...]:
    """The effective ranks at every block's `attn_in` and `block_out`, means over the rows."""
    sites: tuple[Literal["attn_in", "block_out"], ...] = ("attn_in", "block_out")
    points = [
        ((block.layer, site), block.sites[site]) for block in decoder.blocks for site in sites if site in block.sites
    ]
    collected: list[NDArray[np.float64]] = []
    done = 0
    for batch in batches(rows, max_batch_tokens=max_batch_tokens):
        seen: dict[tuple[int, Literal["attn_in", "block_out"]], torch.Tensor] = {}
        kept = [[at for at in range(len(row)) if at not in massive.get(row.index, ())] for row in batch.rows]

        def see(key: Any, hidden: torch.Tensor, kept: Any = kept, batch: Any = batch, into: Any = seen) -> None:
            pairs = []
            for place, row in enumerate(batch.rows):
                tokens = hidden[place, : len(row)]
                whole = spectral_entropy(tokens)
                ordinary = spectral_entropy(tokens[kept[place]]) if len(kept[place]) < len(row) else whole
                pairs.append(torch.stack([whole, ordinary]))
            into[key] = torch.stack(pairs)

        with hooks.watch(points, see):
            forward(decoder.model, batch)
        collected.append(_on_host([seen[key] for key, _ in points]))
        done += sum(batch.lengths)
        report(done)
    if not collected:
        return ()
    entropy = np.concatenate(collected, axis=1)  # [points, rows, with and without]
    mean, rank = entropy.mean(axis=1), np.exp(entropy).mean(axis=1)
    if not massive:
        mean[:, 1] = rank[:, 1] = np.nan
    return tuple(
        EffectiveRank(layer, site, *_plain(rank[place]), *_plain(mean[place]))
        for place, ((layer, site), _) in enumerate(points)
    )


# --- plain values --------------------------------------------------------------------------------------------------


def _plain(values: NDArray[np.float64]) -> tuple[float | None, ...]:
    return tuple(float(value) if np.isfinite(value) else None for value in values)
