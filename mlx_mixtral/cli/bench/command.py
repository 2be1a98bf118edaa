"""``mlx-mixtral bench``: how fast a model is here, against what memory allows, published figures and mlx-lm."""

from __future__ import annotations

from typing import Any

import click

from mlx_mixtral.cli.bench.options import BenchOptions
from mlx_mixtral.cli.console import emit_json
from mlx_mixtral.cli.fields import takes

__all__ = ["bench"]


@click.command()
@takes(BenchOptions)
def bench(given: BenchOptions) -> None:
    """Measure how fast MODEL, a folder or a hub repository, is on this machine.

    Prompts are random tokens and generation is greedy. Shown are medians and, behind them, the least and the most. The share
    of memory bandwidth is what decoding reads (attention, the experts of a token, keys and values) over what copying in
    memory reaches in the same run. `none` leaves a list out. Default lists are cut to the model's context.

    On MLX's CPU backend --compare runs mlx-lm twice: as it comes, and in float32, in which we compute there.
    """
    from mlx_mixtral.cli.bench.job import BenchJob

    job = BenchJob(given)
    try:
        job.run()
    except KeyboardInterrupt:
        if not job.report.of("prefill") and not job.report.of("decode") and not job.report.of("batch"):
            raise
        _show(job, given.as_json)
        raise
    _show(job, given.as_json)
    job.plot()


def _show(job: Any, as_json: bool) -> None:
    if as_json:
        emit_json(job.to_dict())
    else:
        job.print()
