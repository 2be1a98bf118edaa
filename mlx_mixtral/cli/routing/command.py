"""``mlx-mixtral routing``: what a model's experts do, by domain, as in section 5 of the paper."""

from __future__ import annotations

import click

from mlx_mixtral.cli.console import emit_json
from mlx_mixtral.cli.fields import flag_name, takes
from mlx_mixtral.cli.routing.options import RoutingOptions
from mlx_mixtral.cli.several import refuse_in_group

__all__ = ["routing"]


@click.command()
@click.pass_context
@takes(RoutingOptions)
def routing(ctx: click.Context, given: RoutingOptions) -> None:
    """Record which experts MODEL chooses for your texts, and show its choices by domain.

    The domain of a text is its file name without the extension, the DOMAIN in DOMAIN=PATH, or a field of its JSONL line.
    The output repeats the analysis of "Mixtral of Experts", section 5, next to the paper's figures: the share of each
    expert, how often consecutive tokens choose the same one, and text coloured by expert. It adds pairs of experts and the
    entropy of the gate.
    """
    refuse_in_group("routing", "run it on one, without mlx.launch")
    if given.trace is None:
        if given.model is None or not given.texts:
            raise click.UsageError("give MODEL and --text, or --trace")
    else:
        for name in ("texts", "save_trace", "max_tokens", "window"):
            if getattr(given, name):
                raise click.UsageError(f"{flag_name(ctx, name)} is for recording; --trace uses an existing recording")
    from mlx_mixtral.cli.routing.job import RoutingJob

    job = RoutingJob(given)
    found = job.run()
    if given.as_json:
        emit_json(found)
    else:
        job.report()
