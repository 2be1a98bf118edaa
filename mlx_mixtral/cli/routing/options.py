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
    trace: str | None = option("--trace FILE", "Analyse what --save-trace wrote; no model is needed.")
    records: RecordOptions = group(RecordOptions)
    max_tokens: int | None = option("--max-tokens N", "Of each domain, from its beginning.  [default: all]")
    window: int | None = option("--window N", "Tokens read at once.  [default: the context, at most 2048]")
    layers: tuple[int, ...] | None = option(
        "--layers LIST",
        "Layers to show one by one.  [default: first,middle,last]",
        callback=number_list(int, "layers", "0,15,31"),
    )
    sample: int | None = option("--sample N", "Tokens of each domain to colour; 0 for none.  [default: 48, HTML 240]")
    no_text: bool = flag("--no-text", "Keep no text: not in the trace, and none is coloured.")
    save_trace: str | None = option(
        "--save-trace FILE",
        "Keep what was recorded; as MODEL/routing.trace, memory budgets of MODEL are planned with it.",
    )
    plot: str | None = option("--plot FILE", "PNG of all figures; needs matplotlib.")
    html: str | None = option("--html FILE", "One self-contained page with everything; needs matplotlib.")
    overwrite: bool = overwrite_flag("the files")
    loading: LoadOptions = group(LoadOptions)
    as_json: bool = json_flag()
