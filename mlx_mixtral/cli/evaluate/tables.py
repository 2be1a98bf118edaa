"""Tables of an evaluation: by domain, by file, by length of context, worst tokens, the passkey heat map."""

from __future__ import annotations

import math

from mlx_mixtral.cli.console import out_console, print_table, rate, seconds, terminal_safe
from mlx_mixtral.evaluation.passkey import PasskeyResult
from mlx_mixtral.evaluation.results import Evaluation, Score, WorstToken
from mlx_mixtral.evaluation.statistics import BLOCK_TOKENS, with_error

__all__ = ["print_evaluation", "print_lengths", "print_passkeys"]

MAX_FILES = 40
SHOWN_BEFORE = 60


def print_evaluation(name: str, reference: str | None, found: Evaluation) -> None:
    """By domain and overall, then by file where that is something else."""
    console = out_console()
    rows = {**found.domains, "all": found.overall}
    _scores(terminal_safe(f"{name} compared with {reference}" if reference else name), "domain", rows)
    if len(found.files) > len(found.domains):
        shown = dict(list(found.files.items())[:MAX_FILES])
        _scores("By file", "file", shown)
        if left := len(found.files) - len(shown):
            console.print(f"and {left} more files: use --json or --output to see them\n")
    for token in found.worst:
        _worst(token)
    if found.worst:
        console.print()
    notes = [f"± is one standard error, over blocks of {BLOCK_TOKENS} tokens"]
    if found.top_k is not None:
        notes.append(
            f"KL in nats; tokens beyond the reference's {found.top_k} likeliest count as one, so it is a lower bound"
        )
    windows = f"windows of {found.window} tokens" + (f" {found.stride} apart" if found.stride != found.window else "")
    notes.append(f"{windows}; {seconds(found.seconds)}, {rate(found.tok_s)}")
    for note in notes:
        console.print(note, style="dim", soft_wrap=True)


def _scores(title: str, what: str, scores: dict[str, Score]) -> None:
    """Two tables of one width: what the model does by itself, and beside the reference."""
    rows = [
        [
            name,
            f"{score.tokens:,}",
            f"{score.bytes:,}",
            with_error(score.perplexity, score.perplexity_stderr),
            with_error(score.bits_per_byte, score.bits_per_byte_stderr),
        ]
        for name, score in scores.items()
    ]
    print_table(title, [what, "tokens", "bytes", "perplexity", "bits/byte"], rows)
    rows = [
        [
            name,
            with_error(other.perplexity_ratio, other.perplexity_ratio_stderr),
            with_error(other.kl_mean, other.kl_stderr),
            f"{other.kl['99']:.4f}",
            f"{other.top1_agreement:.1%}",
        ]
        for name, score in scores.items()
        if (other := score.comparison) is not None
    ]
    if rows:
        print_table("", [what, "perplexity ratio", "mean KL", "KL 99%", "top-1"], rows)


def print_lengths(found: Evaluation) -> None:
    """Perplexity by length of context."""
    rows = [
        [
            f"{bucket.low}–{bucket.high}",
            f"{bucket.tokens:,}",
            with_error(bucket.perplexity, bucket.perplexity_stderr),
        ]
        for bucket in found.by_length
    ]
    out_console().print()
    print_table("By length of context", ["tokens of context", "tokens", "perplexity"], rows)
    if found.by_length[-1].high < found.window or found.by_length[-1].tokens < BLOCK_TOKENS:
        out_console().print("The texts are too short to fill the longest context; give longer ones.", style="dim")


def print_passkeys(result: PasskeyResult) -> None:
    """The heat map: lengths across, depths down."""
    from rich.style import Style
    from rich.text import Text

    console = out_console()
    width = max(7, *(len(f"{length:,}") + 2 for length in result.lengths))
    console.print(f"\nPasskeys found, {result.accuracy:.0%} of all", style="bold")
    console.print(
        "  depth" + "".join(f"{length:,}".rjust(width) for length in result.lengths) + "  tokens", style="dim"
    )
    for row, depth in enumerate(result.depths):
        line = Text(f"{depth:>6.0%} ")
        for cells in result.found:
            share = cells[row]
            colour = f"rgb({round(200 * (1 - share)) + 20},{round(150 * share) + 40},50)"
            line.append(f"{share:.0%}".center(width), Style(color="white", bgcolor=colour))
        console.print(line, soft_wrap=True)
    prompts = result.trials * len(result.lengths) * len(result.depths)
    console.print(f"{prompts} prompts, {result.trials} each, seed {result.seed}", style="dim")


def _worst(token: WorstToken) -> None:
    """``KL 3.21  code.txt, token 123: …text before[token] p 0.1% (reference 24%); likeliest 'x' (reference 'y')``."""
    before = _visible(token.before)[-SHOWN_BEFORE:]
    line = (
        f"KL {token.kl:.2f}  {token.file}, token {token.place}: …{before}[{_visible(token.token)}] "
        f"p {math.exp(token.logprob):.2%}, reference {math.exp(token.reference_logprob):.2%}; "
        f"likeliest [{_visible(token.best)}], reference [{_visible(token.reference_best)}]"
    )
    out_console().print(terminal_safe(line), soft_wrap=True)


def _visible(text: str) -> str:
    return text.replace("\n", "⏎").replace("\t", "→")
