"""Options of ``report``."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_mixtral.cli.evaluate.options import DEPTHS, LENGTHS
from mlx_mixtral.cli.options import LoadOptions, RecordOptions, argument, flag, group, json_flag, option

__all__ = ["ReportOptions"]


@dataclass(frozen=True)
class ReportOptions:
    model: str = argument()
    reference: str | None = option(
        "--reference", metavar="OTHER", help="Compare with this model, or a file `evaluate` saved."
    )
    texts: tuple[str, ...] = option(
        "--text", multiple=True, metavar="PATH",
        help="File, folder or .jsonl, or DOMAIN=PATH; repeatable.  [default: the text bundled for calibration]",
    )  # fmt: skip
    records: RecordOptions = group(RecordOptions)
    quick: bool = flag("--quick", help="Less text, fewer and shorter passkey prompts.")
    max_bytes: int | None = option(
        "--max-bytes", metavar="N",
        help="Only this much of the start of each text.  [default: 32768; --quick: 4096]",
    )  # fmt: skip
    window: int | None = option(
        "--window", metavar="N", help="Tokens read at once.  [default: the context, at most 2048]"
    )
    lengths: tuple[int, ...] | None = option(
        "--lengths", callback=LENGTHS, metavar="LIST",
        help="Of passkey prompts, in tokens.  [default: 512 to 4096 as the context allows; --quick: to 1024]",
    )  # fmt: skip
    depths: tuple[float, ...] | None = option(
        "--depths", callback=DEPTHS, metavar="LIST",
        help="Where the key stands.  [default: 0,0.25,0.5,0.75,1; --quick: 0,0.5,1]",
    )  # fmt: skip
    trials: int = option("--trials", default=1, show_default=True, help="Prompts of each length and depth.")
    seed: int = option("--seed", default=0, show_default=True, help="Of keys and filler text.")
    output: str | None = option(
        "--output", metavar="FOLDER", help="The folder to make.  [default: the model's name and -report]"
    )
    overwrite: bool = flag("--overwrite", help="Replace an earlier report in FOLDER.")
    no_plots: bool = flag("--no-plots", help="Markdown alone.")
    loading: LoadOptions = group(LoadOptions)
    as_json: bool = json_flag()
