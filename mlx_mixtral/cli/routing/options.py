"""Options of ``routing``."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_mixtral.cli.fields import argument, flag, group, option
from mlx_mixtral.cli.options import LoadOptions, RecordOptions, json_flag, number_list, overwrite_flag
from mlx_mixtral.cli.values import ModelName

__all__ = ["RoutingOptions"]


@dataclass(frozen=True)
class RoutingOptions:
    model: str | None = argument(required=False, type=ModelName())
    texts: tuple[str, ...] = option("--text PATH", "File, folder or .jsonl, or DOMAIN=PATH; repeatable.", multiple=True)
    trace: str | None = option("--trace FILE", "Analyse a file that --save-trace wrote; needs no model.")
    records: RecordOptions = group(RecordOptions)
    max_tokens: int | None = option("--max-tokens N", "Read only the first N tokens of each domain.  [default: all]")
    window: int | None = option("--window N", "Tokens in one window.  [default: the context, at most 2048]")
    layers: tuple[int, ...] | None = option(
        "--layers LIST",
        "Layers to show separately.  [default: the first, middle and last]",
        callback=number_list(int, "layers", "0,15,31"),
    )
    sample: int | None = option(
        "--sample N", "Tokens of each domain to colour by expert; 0 for none.  [default: 48; --html: 240]"
    )
    no_text: bool = flag("--no-text", "Leave all text out of the trace and the output.")
    save_trace: str | None = option(
        "--save-trace FILE",
        "Save the recording. Under the name MODEL/routing.trace it improves the memory plans of MODEL.",
    )
    plot: str | None = option("--plot FILE", "Write a PNG of all figures; needs matplotlib.")
    html: str | None = option("--html FILE", "Write one self-contained page with everything; needs matplotlib.")
    overwrite: bool = overwrite_flag("the files")
    loading: LoadOptions = group(LoadOptions)
    as_json: bool = json_flag()
