"""One text generated and printed, as text or as JSON: what ``generate`` and one answer of ``chat`` have in common."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from mlx_mixtral import Chunk, TextStream
from mlx_mixtral.cli.adapters import AdapterFacts
from mlx_mixtral.cli.console import emit_json, note
from mlx_mixtral.cli.streaming import Interruptible, completion, note_warnings, print_stream, stats_line
from mlx_mixtral.cli.terminal_modes import keeping_output

__all__ = ["print_answer"]


def print_answer(
    begin: Callable[[Interruptible], TextStream],
    *,
    load_s: float,
    adapter: AdapterFacts | None,
    as_json: bool,
    with_stats: bool,
    with_logprobs: bool = False,
    show_ids: bool = False,
) -> None:
    """Generate, and print the text on stdout as it comes, or JSON at the end; a line of speeds goes to stderr.

    Args:
        begin: starts the generation; its ``cancelled`` and ``on_prefill`` are those of what it is given.
        load_s: seconds that loading took, part of the JSON.
        adapter: what it is computed with, part of the JSON.
        show_ids: print token ids in place of text.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; what had been generated is printed.
    """
    chunks: list[Chunk] = []
    with keeping_output(sys.stdout), Interruptible() as interrupt:
        stream = begin(interrupt)
        note_warnings(stream.stats)
        try:
            if as_json:
                with stream:
                    for chunk in stream:
                        chunks.append(chunk)  # noqa: PERF402 - an interrupt must not lose those that came before it
            else:
                print_stream(stream, show_ids=show_ids)
        except KeyboardInterrupt:
            interrupt.pressed = True
    if as_json and (chunks or not interrupt.pressed):
        stats = {**stream.stats.to_dict(), "load_s": load_s}
        found = completion(chunks) | {"adapter": None if adapter is None else adapter.to_dict(), "stats": stats}
        emit_json(found | ({"logprobs": _logprobs(chunks)} if with_logprobs else {}))
    if interrupt.pressed:
        raise KeyboardInterrupt
    if with_stats and not as_json:
        note(stats_line(stream.stats))


def _logprobs(chunks: Sequence[Chunk]) -> list[dict[str, Any]]:
    return [
        {
            "token_id": chunk.token_id,
            "logprob": chunk.logprob,
            "top": [{"token_id": token, "logprob": value} for token, value in chunk.top_logprobs],
        }
        for chunk in chunks
    ]
