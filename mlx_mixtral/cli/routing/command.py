"""``mlx-mixtral routing``: what a model's experts do, by domain, as in section 5 of the paper."""

from __future__ import annotations

import click

from mlx_mixtral.cli.console import emit_json
from mlx_mixtral.cli.fields import flag_name, takes
from mlx_mixtral.cli.routing.options import RoutingOptions

__all__ = ["routing"]


@click.command()
@click.pass_context
@takes(RoutingOptions)
def routing(ctx: click.Context, given: RoutingOptions) -> None:
    """Record which experts MODEL chooses for texts of yours, and show what it does with them by domain.

    A text's domain is its file's name without the ending, or what DOMAIN=PATH says, or a JSONL line's own. Shown are the
    figures of "Mixtral of Experts", section 5, beside the paper's: shares of experts, repeats from token to token and over
    layers, and text coloured by expert; and pairs of experts, and the entropy of the gate.
    """
    if given.trace is None:
        if given.model is None or not given.texts:
            raise click.UsageError("give MODEL and --text, or --trace")
    else:
        for name in ("texts", "save_trace", "max_tokens", "window"):
            if getattr(given, name):
                raise click.UsageError(f"{flag_name(ctx, name)} is for recording; --trace names what was recorded")
    from mlx_mixtral.cli.routing.job import RoutingJob

    job = RoutingJob(given)
    found = job.run()
    if given.as_json:
        emit_json(found)
    else:
        job.report()
