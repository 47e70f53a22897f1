"""A rigidity result at a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from melayer.presentation.tables import number, print_answer, print_text, table

if TYPE_CHECKING:
    from melayer.measurements.rigidity.result import RigidityResult


def show_rigidity(result: RigidityResult, console: Console) -> None:
    """Prints a rigidity result: the answer, then for each block its cosines and effective ranks."""
    print_answer(console, result.sentence, result.notes)
    console.print(_blocks(result))
    model = result.model
    first = "one first token" if result.fixed_first_token else f"{result.n_first_tokens} first tokens"
    ranked = "" if result.tokens is None else f" of {result.tokens:,.0f} tokens (median)"
    print_text(
        console,
        f"next, peak: cosine of the followed token's state with the next block's and with its peak, over "
        f"{result.n_sequences} texts. inputs: mean pairwise cosine over {first}. attn, out: effective rank of what "
        f"attention reads and of the block's output, with (+) and without (-) the massive tokens, over "
        f"{result.n_rank_sequences} texts{ranked}. "
        f"{model.name}, {model.dtype}, fingerprint {model.fingerprint}. Blocks are 0-based.",
        style="dim",
    )


def _blocks(result: RigidityResult) -> Table:
    ranks = {(row.layer, str(row.site)): (row.with_massive, row.without_massive) for row in result.effective_rank}
    columns = [(name, True) for name in ("block", "next", "peak", "inputs")]
    columns += [(f"{site} {sign}", True) for site in ("attn", "out") for sign in "+-"]
    rows = []
    for layer in range(result.model.n_layers):
        following = result.cosine_next[layer] if layer < len(result.cosine_next) else None
        cosines = [following, result.cosine_peak[layer], result.cosine_inputs[layer]]
        cells = [layer, *(number(value, 4) for value in cosines)]
        for site in ("attn_in", "block_out"):
            with_massive, without = ranks.get((layer, site), (None, None))
            cells += [number(with_massive, 1), number(without, 1)]
        mark = "<- ME layer" if layer == result.me_layer else "erases" if layer in result.erased_at else ""
        rows.append([*cells, mark])
    return table("Blocks", [*columns, ("", False)], rows)
