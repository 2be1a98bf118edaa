"""``mlx-mixtral evaluate``: perplexity by domain, distance to a reference, long context, tasks of lm-evaluation-harness."""

from __future__ import annotations

from typing import Any

import click

from mlx_mixtral.cli.console import emit_json
from mlx_mixtral.cli.options import json_option, loading_options, number_list

__all__ = ["evaluate"]

LENGTHS = number_list(int, "numbers", "1024,2048")
DEPTHS = number_list(float, "numbers", "0,0.5,1")


TEXT_OPTIONS = (
    "texts", "text_field", "domain_field", "max_bytes", "window", "stride", "reference", "save_reference", "top_k", "worst",
    "by_length", "passkey", "lengths", "depths", "trials", "seed", "plot",
)  # fmt: skip
TASK_OPTIONS = ("shots", "limit", "task_path", "batch_size", "chat_template")


@click.command(short_help="Perplexity, distance to a reference, long context, tasks.")
@click.argument("model")
@click.option(
    "--text", "texts", multiple=True, metavar="PATH", help="File, folder or .jsonl, or DOMAIN=PATH; repeatable."
)
@click.option("--text-field", default="text", show_default=True, metavar="KEY", help="Key of the text in JSONL.")
@click.option("--domain-field", default="domain", show_default=True, metavar="KEY", help="Key of its domain.")
@click.option("--max-bytes", type=int, metavar="N", help="Only this much of the start of each text.")
@click.option("--window", type=int, metavar="N", help="Tokens read at once.  [default: the context, at most 2048]")
@click.option("--stride", type=int, metavar="N", help="Tokens from window to window; less overlaps.  [default: window]")
@click.option("--reference", metavar="OTHER", help="Compare with this model, or with a file --save-reference wrote.")
@click.option(
    "--save-reference", metavar="FILE", help="Keep the likeliest tokens of each distribution to compare with."
)
@click.option("--top-k", type=int, metavar="K", help="How many of them; the others count as one.  [default: 128]")
@click.option("--worst", type=int, default=5, show_default=True, help="Tokens farthest from the reference to show.")
@click.option("--by-length", is_flag=True, help="Perplexity by length of context, windows as long as the model's.")
@click.option("--passkey", is_flag=True, help="Can it find a number hidden in filler text, by length and depth?")
@click.option(
    "--lengths",
    callback=LENGTHS,
    metavar="LIST",
    help="Of passkey prompts, in tokens: 1024,2048.",
)
@click.option(
    "--depths",
    callback=DEPTHS,
    metavar="LIST",
    help="Where the key stands, 0 to 1: 0,0.5,1.",
)
@click.option("--trials", type=int, default=1, show_default=True, help="Prompts of each length and depth.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of keys and filler text.")
@click.option(
    "--tasks", metavar="LIST", help="Tasks of lm-evaluation-harness: hellaswag,gsm8k; needs the extra `eval`."
)
@click.option("--shots", type=int, metavar="N", help="Examples before each question.  [default: the task's own]")
@click.option("--limit", type=int, metavar="N", help="Only the first N questions of each task.")
@click.option("--task-path", metavar="DIR", help="Folder of task files (.yaml); data they name lie from where you are.")
@click.option("--batch-size", type=int, metavar="N", help="Most requests at once.  [default: 16]")
@click.option("--chat-template", is_flag=True, help="Ask in the model's chat format.")
@click.option("--plot", metavar="FILE", help="PNG of --by-length and --passkey.")
@click.option("--output", metavar="FILE", help="Write the result as JSON; a journal beside it lets a run go on.")
@click.option("--resume", metavar="FILE", help="Name of that journal.  [default: the output's and .journal]")
@click.option("--restart", is_flag=True, help="Forget what the journal has.")
@loading_options
@json_option
def evaluate(model: str, as_json: bool, **options: Any) -> None:
    """Measure MODEL, a folder or a hub repository, on texts of yours: perplexity and bits per byte by domain.

    A text's domain is its file's name without the ending, or what DOMAIN=PATH says, or a JSONL line's own. Every token but
    BOS is predicted exactly once. With --reference also KL divergence, top-1 agreement and the ratio of perplexities; a
    reference model is run first and dropped, so that the two are never in memory together.

    With --tasks, benchmarks instead of texts, beside the figures that were published of Mixtral 8x7B. Their data are fetched
    from the hub at the first run, unless --task-path names tasks of local files.
    """
    if not options["texts"] and not options["passkey"] and options["tasks"] is None:
        raise click.UsageError("give --text, --passkey or both, or --tasks")
    if options["tasks"] is not None and (options["texts"] or options["passkey"]):
        raise click.UsageError("--tasks is measured by itself; run --text and --passkey in a command of their own")
    needs = {
        "texts": ("reference", "save_reference", "by_length", "window", "stride", "max_bytes"),
        "passkey": ("lengths", "depths"),
        "tasks": TASK_OPTIONS,
    }
    for needed, names in needs.items():
        for name in names:
            is_given = options[name] is not None and options[name] is not False and options[name] != ()
            if is_given and not options[needed]:
                flag = "--text" if needed == "texts" else f"--{needed}"
                raise click.UsageError(f"--{name.replace('_', '-')} applies with {flag} only")
    if options["plot"] and not (options["by_length"] or options["passkey"]):
        raise click.UsageError("--plot shows --by-length and --passkey; give one of them")
    if options["restart"] and not (options["output"] or options["resume"]):
        raise click.UsageError("--restart applies with --output or --resume only")
    job = _job(model, options)
    found = job.run()
    if as_json:
        emit_json(found)
    else:
        job.report()


def _job(model: str, options: dict[str, Any]) -> Any:
    """What carries the command out, with the options it knows."""
    if options["tasks"] is not None:
        from mlx_mixtral.cli.evaluate.task_job import TaskJob

        return TaskJob(model, **{name: value for name, value in options.items() if name not in TEXT_OPTIONS})
    from mlx_mixtral.cli.evaluate.job import EvaluationJob

    return EvaluationJob(
        model, **{name: value for name, value in options.items() if name not in ("tasks", *TASK_OPTIONS)}
    )
