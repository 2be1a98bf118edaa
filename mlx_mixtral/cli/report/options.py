"""Options of ``report``."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_mixtral.cli.evaluate.options import DEPTHS, LENGTHS
from mlx_mixtral.cli.fields import argument, flag, group, option
from mlx_mixtral.cli.options import LoadOptions, RecordOptions, json_flag
from mlx_mixtral.cli.values import ModelName

__all__ = ["ReportOptions"]


@dataclass(frozen=True)
class ReportOptions:
    model: str = argument(type=ModelName())
    reference: str | None = option(
        "--reference OTHER", "Compare with this model, or with a file that `evaluate --save-reference` wrote."
    )
    texts: tuple[str, ...] = option(
        "--text PATH",
        "File, folder or .jsonl, or DOMAIN=PATH; repeatable.  [default: the text bundled for calibration]",
        multiple=True,
    )
    records: RecordOptions = group(RecordOptions)
    quick: bool = flag("--quick", "Use less text, and fewer and shorter passkey prompts.")
    max_bytes: int | None = option(
        "--max-bytes SIZE", "Evaluate only this much of the start of each text.  [default: 32768; --quick: 4096]"
    )
    window: int | None = option("--window N", "Tokens in one window.  [default: the context, at most 2048]")
    lengths: tuple[int, ...] | None = option(
        "--lengths LIST",
        "Lengths of passkey prompts, in tokens.  [default: 512 to 4096 as the context allows; --quick: to 1024]",
        callback=LENGTHS,
    )
    depths: tuple[float, ...] | None = option(
        "--depths LIST",
        "Where in the prompt the number is hidden, from 0 to 1.  [default: 0,0.25,0.5,0.75,1; --quick: 0,0.5,1]",
        callback=DEPTHS,
    )
    trials: int = option("--trials", "Passkey prompts for each length and depth.", default=1)
    seed: int = option("--seed", "Seed for the hidden numbers and the filler text.", default=0)
    output: str | None = option("--output FOLDER", "Folder to write.  [default: the model's name followed by -report]")
    overwrite: bool = flag("--overwrite", "Replace an earlier report in FOLDER.")
    no_plots: bool = flag("--no-plots", "Write Markdown only.")
    loading: LoadOptions = group(LoadOptions)
    as_json: bool = json_flag()
