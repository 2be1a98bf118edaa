"""The table of tasks: what was measured here, beside what the paper has for just this task, metric and number of shots."""

from __future__ import annotations

from mlx_mixtral.cli.console import out_console, plural, print_table, seconds, terminal_safe
from mlx_mixtral.evaluation.harness.published import PUBLISHED_MODEL, published_for
from mlx_mixtral.evaluation.harness.tasks import TaskResults, TaskScore

__all__ = ["print_tasks"]

# Metrics lm_eval gives as shares of 1; others have a unit of their own.
SHARES = frozenset({"acc", "acc_norm", "acc_mutual_info", "exact_match", "em", "f1", "mcc", "brier_score"})
OWN_FILTER = "none"


def print_tasks(name: str, results: TaskResults, limit: int | None, chat: bool) -> None:
    """Task by task, metric by metric."""
    console = out_console()
    rows, tables = [], set()
    for score in results.scores:
        row = published_for(score.task, score.metric, score.shots)
        if row is not None:
            tables.add(row.table)
        rows.append(
            [
                score.task,
                score.metric if score.filter == OWN_FILTER else f"{score.metric} ({score.filter})",
                "–" if score.shots is None else str(score.shots),
                "–" if score.samples is None else f"{score.samples:,}",
                _value(score),
                "–" if row is None else f"{row.percent:.1f}%",
            ]
        )
    columns = ["task", "metric", "shots", "asked", "here", "paper"]
    print_table(terminal_safe(name), columns, rows, left=2)
    notes = ["± is one standard error"]
    if tables:
        where = " and ".join(map(str, sorted(tables)))
        notes.append(
            f"paper: {PUBLISHED_MODEL} in arXiv 2401.04088, table{'s' * (len(tables) > 1)} {where}, measured by its authors "
            "with their own pipeline"
        )
    if limit is not None:
        notes.append(f"only the first {plural(limit, 'question')} of each task")
    if results.truncated:
        requests = "1 request was" if results.truncated == 1 else f"{results.truncated:,} requests were"
        notes.append(f"{requests} longer than the context, and lost the start; --context reserves more")
    how = "in the checkpoint's chat format" if chat else "as plain text"
    notes.append(f"asked {how} by lm_eval {results.harness}; {seconds(results.seconds)}")
    for note in notes:
        console.print(note, style="dim", soft_wrap=True)


def _value(score: TaskScore) -> str:
    """``62.5% ± 12.5%``."""
    share = score.metric in SHARES
    value = f"{score.value:.1%}" if share else f"{score.value:.4g}"
    if score.stderr is None:
        return value
    return f"{value} ± {score.stderr:.1%}" if share else f"{value} ± {score.stderr:.2g}"
