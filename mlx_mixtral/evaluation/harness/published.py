"""What was published of Mixtral 8x7B on tasks that lm_eval has: arXiv 2401.04088, tables 2 and 3.

The authors measured with their own pipeline and do not name the metric of every row. Multiple choice stands for lm_eval's
``acc_norm`` where continuations differ in length, as in the tables of its kind, else for ``acc``. Rows that lm_eval cannot
measure alike are left out: GSM8K at 8 and MATH at 4 shots are majorities of several samples, HumanEval and MBPP run code.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["PUBLISHED", "PUBLISHED_MODEL", "PublishedTask", "published_for"]

PUBLISHED_MODEL = "Mixtral 8x7B"


class PublishedTask(NamedTuple):
    """A figure in per cent, by lm_eval's names of the task and its metric, and by shots; the paper's table it stands in."""

    task: str
    metric: str
    shots: int
    percent: float
    table: int


PUBLISHED = (
    PublishedTask("mmlu", "acc", 5, 70.6, 2),
    PublishedTask("hellaswag", "acc_norm", 0, 84.4, 2),
    PublishedTask("winogrande", "acc", 0, 77.2, 2),
    PublishedTask("piqa", "acc_norm", 0, 83.6, 2),
    PublishedTask("arc_easy", "acc_norm", 0, 83.1, 2),
    PublishedTask("arc_challenge", "acc_norm", 0, 59.7, 2),
    PublishedTask("nq_open", "exact_match", 5, 30.6, 2),
    PublishedTask("triviaqa", "exact_match", 5, 71.5, 2),
    PublishedTask("hellaswag", "acc_norm", 10, 86.7, 3),
    PublishedTask("arc_challenge", "acc_norm", 25, 85.8, 3),
    PublishedTask("winogrande", "acc", 5, 81.2, 3),
    PublishedTask("gsm8k", "exact_match", 5, 58.4, 3),
)


def published_for(task: str, metric: str, shots: int | None) -> PublishedTask | None:
    """The figure for just this task, metric and number of shots; None where the paper has none."""
    return next((row for row in PUBLISHED if (row.task, row.metric, row.shots) == (task, metric, shots)), None)
