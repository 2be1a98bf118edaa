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
    max_bytes: int | None = option("--max-bytes SIZE", "Only this much of the start of each text.")
    window: int | None = option("--window N", "Tokens read at once.  [default: the context, at most 2048]")
    stride: int | None = option("--stride N", "Tokens from window to window; less overlaps.  [default: window]")
    reference: str | None = option(
        "--reference OTHER", "Compare with this model, or with a file --save-reference wrote."
    )
    save_reference: str | None = option(
        "--save-reference FILE", "Keep the likeliest tokens of each distribution to compare with."
    )
    top_k: int | None = option("--top-k K", "How many of them; the others count as one.  [default: 128]")
    worst: int = option("--worst", "Tokens farthest from the reference to show.", default=5)
    by_length: bool = flag("--by-length", "Perplexity by length of context, windows as long as the model's.")
    passkey: bool = flag("--passkey", "Can it find a number hidden in filler text, by length and depth?")
    lengths: tuple[int, ...] | None = option(
        "--lengths LIST", "Of passkey prompts, in tokens: 1024,2048.", callback=LENGTHS
    )
    depths: tuple[float, ...] | None = option(
        "--depths LIST", "Where the key stands, 0 to 1: 0,0.5,1.", callback=DEPTHS
    )
    trials: int = option("--trials", "Prompts of each length and depth.", default=1)
    seed: int = option("--seed", "Of keys and filler text.", default=0)
    tasks: str | None = option(
        "--tasks LIST", "Tasks of lm-evaluation-harness: hellaswag,gsm8k; needs the extra `eval`."
    )
    shots: int | None = option("--shots N", "Examples before each question.  [default: the task's own]")
    limit: int | None = option("--limit N", "Only the first N questions of each task.")
    task_path: str | None = option(
        "--task-path DIR", "Folder of task files (.yaml); data they name lie from where you are."
    )
    batch_size: int | None = option("--batch-size N", "Most requests at once.  [default: 16]")
    chat_template: bool = flag("--chat-template", "Ask in the model's chat format.")
    plot: str | None = option("--plot FILE", "PNG of --by-length and --passkey.")
    output: str | None = option("--output FILE", "Write the result as JSON; a journal beside it lets a run go on.")
    overwrite: bool = overwrite_flag("the files")
    resume: str | None = option("--resume FILE", "Name of that journal.  [default: the output's and .journal]")
    restart: bool = flag("--restart", "Forget what the journal has.")
    loading: LoadOptions = group(LoadOptions)
    as_json: bool = json_flag()
