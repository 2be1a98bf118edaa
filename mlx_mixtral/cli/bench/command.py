"""``mlx-mixtral bench``: how fast a model is here, against what memory allows, published figures and mlx-lm."""

from __future__ import annotations

from typing import Any

import click

from mlx_mixtral.cli.bench.options import BenchOptions
from mlx_mixtral.cli.console import emit_json
from mlx_mixtral.cli.fields import takes
from mlx_mixtral.cli.several import follow_leader, refuse_in_group

__all__ = ["bench"]


@click.command()
@takes(BenchOptions)
def bench(given: BenchOptions) -> None:
    """Measure how fast MODEL, a folder or a hub repository, is on this machine.

    Prompts are random tokens and generation is greedy. Each figure is a median, followed by the minimum and maximum. The
    share of memory bandwidth is the rate at which decoding reads data (attention, a token's experts, keys and values)
    divided by the rate of copying memory in the same run. `none` skips a list. Default lists are cut to the model's context.

    On MLX's CPU backend, --compare runs mlx-lm twice: with its default type, and in float32, the type used here.
    """
    if given.compare is not None:
        refuse_in_group("--compare", "compare on one, without mlx.launch")
    follow_leader(given.model, given.loading)
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
