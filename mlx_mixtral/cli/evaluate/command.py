"""``mlx-mixtral evaluate``: perplexity by domain, distance to a reference, long context, tasks of lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_mixtral.cli.console import emit_json
from mlx_mixtral.cli.evaluate.options import EvaluateOptions
from mlx_mixtral.cli.fields import flag_name, takes
from mlx_mixtral.cli.several import follow_leader, refuse_in_group

__all__ = ["evaluate"]

# Options that have a meaning beside another one only.
NEEDS = {
    "texts": ("reference", "save_reference", "by_length", "window", "stride", "max_bytes"),
    "passkey": ("lengths", "depths"),
    "tasks": ("shots", "limit", "task_path", "batch_size", "chat_template"),
}


@click.command()
@click.pass_context
@takes(EvaluateOptions)
def evaluate(ctx: click.Context, given: EvaluateOptions) -> None:
    """Measure MODEL, a folder or a hub repository, on your texts: perplexity and bits per byte by domain.

    The domain of a text is its file name without the extension, the DOMAIN in DOMAIN=PATH, or a field of its JSONL line.
    Every token except BOS is predicted exactly once. --reference adds KL divergence, top-1 agreement and the ratio of
    perplexities; the reference model runs first and is then unloaded, so that memory never holds both.

    --tasks runs benchmarks instead of texts and prints the published figures of Mixtral 8x7B beside them. Their data are
    downloaded from the hub on first use, unless --task-path names tasks in local files.
    """
    if given.reference is not None and not Path(given.reference).is_file():
        refuse_in_group("a --reference that is a model", "run it on one with --save-reference, and give that file here")
    follow_leader(given.model, given.loading)
    _check(ctx, given)
    if given.tasks is not None:
        from mlx_mixtral.cli.evaluate.task_job import TaskJob

        job: Any = TaskJob(given)
    else:
        from mlx_mixtral.cli.evaluate.job import EvaluationJob

        job = EvaluationJob(given)
    found = job.run()
    if given.as_json:
        emit_json(found)
    else:
        job.report()


def _check(ctx: click.Context, given: EvaluateOptions) -> None:
    """Refuse options that do not go together."""
    if not given.texts and not given.passkey and given.tasks is None:
        raise click.UsageError("give --text, --passkey or both, or else --tasks")
    if given.tasks is not None and (given.texts or given.passkey):
        raise click.UsageError("--tasks cannot be combined with --text or --passkey; run them in a separate command")
    for needed, names in NEEDS.items():
        for name in names:
            value = getattr(given, name)
            is_set = value is not None and value is not False and value != ()
            if is_set and not getattr(given, needed):
                raise click.UsageError(f"{flag_name(ctx, name)} applies only with {flag_name(ctx, needed)}")
    if given.plot and not (given.by_length or given.passkey):
        raise click.UsageError("--plot shows the results of --by-length and --passkey; give at least one of them")
    if given.restart and not (given.output or given.resume):
        raise click.UsageError("--restart applies only with --output or --resume")
