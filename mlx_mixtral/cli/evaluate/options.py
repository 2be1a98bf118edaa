"""Options of ``evaluate``: of texts, of passkeys, and of tasks."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_mixtral.cli.options import LoadOptions, RecordOptions, argument, flag, group, json_flag, number_list, option

__all__ = ["DEPTHS", "LENGTHS", "EvaluateOptions"]

LENGTHS = number_list(int, "numbers", "1024,2048")
DEPTHS = number_list(float, "numbers", "0,0.5,1")


@dataclass(frozen=True)
class EvaluateOptions:
    model: str = argument()
    texts: tuple[str, ...] = option(
        "--text", multiple=True, metavar="PATH", help="File, folder or .jsonl, or DOMAIN=PATH; repeatable."
    )
    records: RecordOptions = group(RecordOptions)
    max_bytes: int | None = option("--max-bytes", metavar="N", help="Only this much of the start of each text.")
    window: int | None = option(
        "--window", metavar="N", help="Tokens read at once.  [default: the context, at most 2048]"
    )
    stride: int | None = option(
        "--stride", metavar="N", help="Tokens from window to window; less overlaps.  [default: window]"
    )
    reference: str | None = option(
        "--reference", metavar="OTHER", help="Compare with this model, or with a file --save-reference wrote."
    )
    save_reference: str | None = option(
        "--save-reference", metavar="FILE", help="Keep the likeliest tokens of each distribution to compare with."
    )
    top_k: int | None = option(
        "--top-k", metavar="K", help="How many of them; the others count as one.  [default: 128]"
    )
    worst: int = option("--worst", default=5, show_default=True, help="Tokens farthest from the reference to show.")
    by_length: bool = flag("--by-length", help="Perplexity by length of context, windows as long as the model's.")
    passkey: bool = flag("--passkey", help="Can it find a number hidden in filler text, by length and depth?")
    lengths: tuple[int, ...] | None = option(
        "--lengths", callback=LENGTHS, metavar="LIST", help="Of passkey prompts, in tokens: 1024,2048."
    )
    depths: tuple[float, ...] | None = option(
        "--depths", callback=DEPTHS, metavar="LIST", help="Where the key stands, 0 to 1: 0,0.5,1."
    )
    trials: int = option("--trials", default=1, show_default=True, help="Prompts of each length and depth.")
    seed: int = option("--seed", default=0, show_default=True, help="Of keys and filler text.")
    tasks: str | None = option(
        "--tasks", metavar="LIST", help="Tasks of lm-evaluation-harness: hellaswag,gsm8k; needs the extra `eval`."
    )
    shots: int | None = option("--shots", metavar="N", help="Examples before each question.  [default: the task's own]")
    limit: int | None = option("--limit", metavar="N", help="Only the first N questions of each task.")
    task_path: str | None = option(
        "--task-path", metavar="DIR", help="Folder of task files (.yaml); data they name lie from where you are."
    )
    batch_size: int | None = option("--batch-size", metavar="N", help="Most requests at once.  [default: 16]")
    chat_template: bool = flag("--chat-template", help="Ask in the model's chat format.")
    plot: str | None = option("--plot", metavar="FILE", help="PNG of --by-length and --passkey.")
    output: str | None = option(
        "--output", metavar="FILE", help="Write the result as JSON; a journal beside it lets a run go on."
    )
    resume: str | None = option(
        "--resume", metavar="FILE", help="Name of that journal.  [default: the output's and .journal]"
    )
    restart: bool = flag("--restart", help="Forget what the journal has.")
    loading: LoadOptions = group(LoadOptions)
    as_json: bool = json_flag()
