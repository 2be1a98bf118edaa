"""Generated text on its way to stdout, and Ctrl-C while it is on its way."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Self

import click

from mlx_mixtral import Chunk, GenerationStats, TextStream
from mlx_mixtral.cli.console import note, one_line, plural, rate, terminal_safe
from mlx_mixtral.sizes import format_bytes

__all__ = ["Interruptible", "completion", "note_warnings", "print_stream", "stats_line"]

LONG_PROMPT_TOKENS = 1024


class Interruptible:
    """While entered, the first Ctrl-C asks the generation to end after its token; the second raises at once.

    An exception thrown into the middle of a step would lose the text of that step; asking keeps text and history whole.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._before: Any = None

    def __enter__(self) -> Self:
        # Who started this with interrupts ignored (a job in the background) wants them ignored.
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        if threading.current_thread() is threading.main_thread() and not ignored:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def cancelled(self) -> bool:
        """For ``cancelled=`` of a generation."""
        return self.pressed

    def on_prefill(self, done: int, total: int) -> None:
        """For ``on_prefill=``: shows how far a long prompt is; Ctrl-C ends the wait between two chunks of it."""
        if total > LONG_PROMPT_TOKENS and sys.stderr.isatty():
            shown = f"reading the prompt: {done}/{total} tokens" if done < total else ""
            click.echo(f"\r\x1b[K{shown}", nl=False, err=True)
        if self.pressed and done < total:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


def print_stream(stream: TextStream, *, show_ids: bool = False) -> tuple[str, list[Chunk]]:
    """Print text as it comes, flushed, and end with a newline; the text and the chunks it came in.

    Args:
        show_ids: print token ids instead, for a checkpoint without a tokenizer.
    """
    is_terminal = sys.stdout.isatty()
    chunks: list[Chunk] = []
    last = "\n"
    try:
        with stream:
            for chunk in stream:
                chunks.append(chunk)
                shown = f"{' ' if len(chunks) > 1 else ''}{chunk.token_id}" if show_ids else chunk.text
                if shown:
                    sys.stdout.write(terminal_safe(shown) if is_terminal else shown)
                    sys.stdout.flush()
                    last = shown
    finally:
        if not last.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()
    return "".join(chunk.text for chunk in chunks), chunks


def completion(chunks: Sequence[Chunk]) -> dict[str, Any]:
    """What was generated, as JSON has it."""
    return {
        "text": "".join(chunk.text for chunk in chunks),
        "token_ids": [chunk.token_id for chunk in chunks],
        "finish_reason": chunks[-1].finish_reason if chunks else "cancelled",
    }


def note_warnings(stats: GenerationStats) -> None:
    """What of a constraint is not kept, on stderr."""
    for warning in stats.warnings:
        note(f"warning: {one_line(warning)}")


def stats_line(stats: GenerationStats) -> str:
    """``24 prompt tokens, 310 tok/s · 40 tokens, 56.3 tok/s · peak memory 26.9 GB``; rates where there are tokens enough."""
    prompt = plural(stats.prompt_tokens, "prompt token")
    counts = ((stats.reused_tokens, "known"), (stats.prompt_special_tokens, "special"))
    if known := ", ".join(f"{count} {what}" for count, what in counts if count):
        prompt += f" ({known})"
    if stats.prompt_tok_s:
        prompt += f", {rate(stats.prompt_tok_s)}"
    decoded = plural(stats.tokens, "token")
    if stats.decode_tok_s:
        decoded += f", {rate(stats.decode_tok_s)}"
    line = f"{prompt} · {decoded} · peak memory {format_bytes(stats.peak_memory_bytes)}"
    if (done := stats.speculation) is not None and done.forwards:
        line += f"\nspeculation: {done.tokens_per_forward:.2f} tokens a forward"
        if done.proposed:
            line += f", {done.acceptance:.0%} of {done.proposed} proposed tokens accepted"
    experts = stats.decode_experts
    if experts is None or stats.tokens < 2:
        return line
    predicted = f" (predicted {rate(stats.predicted_tok_s)})" if stats.predicted_tok_s else ""
    return (
        f"{line}\nexperts: {experts.hit_rate:.0%} in memory, {format_bytes(experts.bytes_read / (stats.tokens - 1))} read a "
        f"token, {experts.wait_s / max(stats.decode_s, 1e-9):.0%} of the time waiting for the disk{predicted}"
    )
