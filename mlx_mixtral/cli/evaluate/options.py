"""Options of ``evaluate``: of texts, of passkeys, and of tasks."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_mixtral.cli.fields import argument, flag, group, option
from mlx_mixtral.cli.options import LoadOptions, RecordOptions, json_flag, number_list, overwrite_flag
from mlx_mixtral.cli.values import ModelName

__all__ = ["DEPTHS", "LENGTHS", "EvaluateOptions"]

LENGTHS = number_list(int, "numbers", "1024,2048")
DEPTHS = number_list(float, "numbers", "0,0.5,1")


@dataclass(frozen=True)
class EvaluateOptions:
    model: str = argument(type=ModelName())
    texts: tuple[str, ...] = option("--text PATH", "File, folder or .jsonl, or DOMAIN=PATH; repeatable.", multiple=True)
    records: RecordOptions = group(RecordOptions)
    max_bytes: int | None = option(
        "--max-bytes SIZE", "Evaluate only this much of the start of each text.  [default: all]"
    )
    window: int | None = option("--window N", "Tokens in one window.  [default: the context, at most 2048]")
    stride: int | None = option(
        "--stride N",
        "Tokens from the start of one window to the next; fewer than --window overlap.  [default: --window]",
    )
    reference: str | None = option(
        "--reference OTHER", "Compare with this model, or with a file that --save-reference wrote."
    )
    save_reference: str | None = option(
        "--save-reference FILE", "Save the likeliest tokens at each position, for later comparisons."
    )
    top_k: int | None = option(
        "--top-k K", "How many tokens to save at each position; the rest count as one.  [default: 128]"
    )
    worst: int = option("--worst", "How many of the tokens farthest from the reference to show.", default=5)
    by_length: bool = flag("--by-length", "Perplexity by length of context, in windows as long as the context.")
    passkey: bool = flag("--passkey", "Test whether the model finds a number hidden in filler text.")
    lengths: tuple[int, ...] | None = option(
        "--lengths LIST",
        "Lengths of --passkey prompts, in tokens, such as 1024,2048.  [default: six, doubling up to the context]",
        callback=LENGTHS,
    )
    depths: tuple[float, ...] | None = option(
        "--depths LIST",
        "Where in the prompt the number is hidden, from 0 to 1.  [default: 0,0.25,0.5,0.75,1]",
        callback=DEPTHS,
    )
    trials: int = option("--trials", "--passkey prompts for each length and depth.", default=1)
    seed: int = option("--seed", "Seed for the hidden numbers and the filler text.", default=0)
    tasks: str | None = option(
        "--tasks LIST", "Tasks of lm-evaluation-harness, such as hellaswag,gsm8k; needs the extra `eval`."
    )
    shots: int | None = option("--shots N", "Examples before each question.  [default: the task's own]")
    limit: int | None = option("--limit N", "Ask only the first N questions of each task.  [default: all]")
    task_path: str | None = option(
        "--task-path DIR", "Folder of task files (.yaml); paths in them are relative to the current folder."
    )
    batch_size: int | None = option("--batch-size N", "Requests processed together, at most.  [default: 16]")
    chat_template: bool = flag("--chat-template", "Ask the questions in the model's chat format.")
    plot: str | None = option("--plot FILE", "Write a PNG of --by-length and --passkey; needs matplotlib.")
    output: str | None = option(
        "--output FILE", "Write the result as JSON, and a journal beside it from which an interrupted run resumes."
    )
    overwrite: bool = overwrite_flag("the files")
    resume: str | None = option("--resume FILE", "Name of that journal.  [default: --output with .journal appended]")
    restart: bool = flag("--restart", "Start over and ignore the journal.")
    loading: LoadOptions = group(LoadOptions)
    as_json: bool = json_flag()
