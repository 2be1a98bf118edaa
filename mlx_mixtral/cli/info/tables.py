"""What ``info`` found, as tables of at most 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_mixtral.cli.console import figures, one_line, out_console, plural, print_table
from mlx_mixtral.cli.settings import VARIABLE, UserSettings, as_toml
from mlx_mixtral.info.estimate import PART_NAMES, PARTS
from mlx_mixtral.info.recipes import RECIPE_NOTE
from mlx_mixtral.info.shape import FITS_NOTE
from mlx_mixtral.sizes import format_bytes

__all__ = ["print_checkpoint", "print_plans", "print_settings", "print_shape", "recipe_cells", "tokens_short"]


def print_shape(report: Mapping[str, Any]) -> None:
    """The report as tables of at most 80 columns."""
    console, widths = out_console(), report["widths"]
    console.print(f"Mixtral {report['model']}", style="bold")
    console.print(
        f"{report['parameters']:,} parameters, {report['active_parameters']:,} of them active per token\n"
        f"{report['layers']} layers, {report['experts']} experts, {report['experts_per_token']} per token, hidden "
        f"{report['hidden_size']}, context {report['context']:,} tokens\n"
    )
    names = [f"{width['bits']}-bit" for width in widths]
    rows = [[PART_NAMES[part], *[format_bytes(width["parts"][part]) for width in widths]] for part in PARTS]
    rows.append(["all", *[format_bytes(width["bytes"]) for width in widths]])
    rows.append(["one expert", *[format_bytes(width["expert_bytes"]) for width in widths]])
    rows.append(["read/token", *[format_bytes(width["bytes_per_token"]) for width in widths]])
    print_table("Weights in groups of 64, with scales and biases; router and norms in 16 bits", ["", *names], rows)
    _print_kv_cache(report["kv_cache"])
    _print_limits(report, names)
    _print_recipes(report["recipes"])
    if report["measured"]:
        print_table(
            "Measured by others (decode tok/s)",
            ["machine", "runtime", "source", "tok/s"],
            [[m["machine"], m["runtime"], m["source"], f"{m['decode_tok_s']:.1f}"] for m in report["measured"]],
            left=3,
        )
    repository = f"mistralai/Mixtral-{report['model'].replace('b', 'B')}-Instruct-v0.1"
    console.print(f"Next: mlx-mixtral convert {repository} mixtral-4bit --bits 4", soft_wrap=True)


def _print_kv_cache(cache: Mapping[str, Any]) -> None:
    contexts = cache["bytes_by_context"]
    each = cache["bytes_per_token"] / 1024
    print_table(
        f"KV cache in 16 bits: {each:g} KiB per token",
        ["context", *[tokens_short(int(count)) for count in contexts]],
        [["bytes", *[format_bytes(count) for count in contexts.values()]]],
    )


def _print_limits(report: Mapping[str, Any], names: Sequence[str]) -> None:
    """Which Macs it fits and the bound their bandwidth sets."""
    print_table(
        "Longest context that fits a Mac, in tokens (-: the weights do not fit)",
        ["memory", "for the GPU", *names],
        [
            [
                f"{row['memory_gib']} GB",
                format_bytes(row["usable_bytes"]),
                *[tokens_short(count) if count else "-" for count in row["context"].values()],
            ]
            for row in report["fits"]
        ],
    )
    out_console().print(f"{FITS_NOTE} Use --memory to set another budget.\n", style="dim")
    print_table(
        "Upper bound on decode speed, tok/s: bandwidth over bytes read per token",
        ["chip", "GB/s", *names],
        [
            [row["chip"], f"{row['bandwidth_gb_s']:g}", *[figures(bound) for bound in row["tok_s"].values()]]
            for row in report["speed_bounds"]
        ],
    )


def _print_recipes(recipes: Sequence[Mapping[str, Any]]) -> None:
    """What to convert to for each Mac; a column for each chip where all rows have the same ones."""
    named = {tuple(recipe["tok_s"]) for recipe in recipes}
    chips = [f"{chip} tok/s" for chip in next(iter(named))] if len(named) == 1 else ["tok/s at most"]
    columns, rows = ["memory", "convert", "bits", "loss", *chips], []
    for recipe in recipes:
        memory, option, bits, loss, speeds = recipe_cells(recipe)
        alone = [_speed(recipe, chip) for chip in recipe["tok_s"]]
        rows.append([memory, option, bits, loss, *(alone if len(named) == 1 else [speeds])])
    print_table("Which conversion to take", columns, rows, left=2)
    out_console().print(f"{RECIPE_NOTE}\n", style="dim")


def recipe_cells(recipe: Mapping[str, Any]) -> list[str]:
    """Memory, option of ``convert``, bits a weight, expected loss, and speeds by chip; ``*`` marks predictions of streaming."""
    sign = {"more than": ">", "less than": "<", "about": "", "exactly": ""}[recipe["kl_is"]]
    speeds = ", ".join(f"{chip} {_speed(recipe, chip)}" for chip in recipe["tok_s"])
    loss = f"{sign}{recipe['expected_kl']:.2g}"
    return [f"{recipe['memory_gib']} GB", recipe["convert"], f"{recipe['bits_per_weight']:.2f}", loss, speeds]


def _speed(recipe: Mapping[str, Any], chip: str) -> str:
    tok_s = recipe["tok_s"][chip]
    return "-" if tok_s is None else figures(tok_s) + ("*" if recipe["kind"] == "streamed" else "")


def tokens_short(count: int) -> str:
    """``32k`` for 32768, ``1.5k`` for 1536; rounded down."""
    if count < 1024:
        return str(count)
    return f"{count // 1024}k" if count >= 10240 or count % 1024 == 0 else f"{count // 102.4 / 10:g}k"


def print_checkpoint(report: Mapping[str, Any], *, with_speed: bool) -> None:
    """The report as tables of at most 80 columns."""
    console = out_console()
    console.print(one_line(report["model"]), style="bold", soft_wrap=True)
    console.print("\n".join(_headlines(report)), soft_wrap=True)
    console.print()
    if report["problem"]:
        console.print(f"This model cannot be loaded as it is: {one_line(report['problem'])}", soft_wrap=True)
        return
    _print_parts(report)
    _print_kv_cache(report["kv_cache"])
    if with_speed or report["bytes"] > 1_000_000_000:
        _print_limits(report, ["this model"])
    for what, names in (("tensor", report["unused_tensors"]), ("file", report["unused_files"])):
        if names:
            shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            console.print(f"Not used: {plural(len(names), what)} ({one_line(shown)})", soft_wrap=True)


def _print_parts(report: Mapping[str, Any]) -> None:
    """Parameters, bytes and formats of each part, and of all."""

    def row(name: str, formats: str, sizes: Mapping[str, Any]) -> list[str]:
        parameters, bits = f"{sizes['parameters']:,}", f"{sizes['bits_per_weight']:.2f}"
        return [name, formats, parameters, bits, format_bytes(sizes["bytes"])]

    rows = [row(PART_NAMES[part["part"]], ", ".join(part["formats"]), part) for part in report["parts"]]
    files = plural(report["files"], "file") if report["files"] else "no files here"
    columns = ["part", "format", "parameters", "bits per weight", "bytes"]
    print_table("Weights", columns, [*rows, row("all", files, report)], left=2)


def _headlines(report: Mapping[str, Any]) -> list[str]:
    tokenizer = report["tokenizer"]
    kind = "dense" if report["architecture"] != "mixtral" else f"{report['experts']} experts"
    per_token = "" if report["architecture"] != "mixtral" else f", {report['experts_per_token']} per token"
    window = f", sliding window {report['sliding_window']:,}" if report["sliding_window"] else ""
    lines = [
        f"{report['architecture']}, {report['parameters']:,} parameters, {report['active_parameters']:,} active per token",
        f"{report['layers']} layers, {kind}{per_token}, hidden {report['hidden_size']}, vocabulary "
        f"{report['vocab_size']:,}, context {report['context']:,} tokens{window}",
    ]
    if tokenizer["kind"] is None:
        lines.append(f"tokenizer: none ({one_line(tokenizer['problem'])})")
    else:
        origin = f" ({one_line(tokenizer['chat_origin'])})" if tokenizer["chat_origin"] else ""
        stops = ", ".join(map(str, tokenizer["eos_token_ids"])) or "no token"
        lines.append(
            f"tokenizer: {tokenizer['kind']}, chat format {tokenizer['chat_format']}{origin}, stops at {stops}"
        )
        lines += [f"note: {one_line(message)}" for message in tokenizer["notes"]]
    if report["conversion"] is not None:
        source = report["conversion"].get("source")
        name = source.get("name") or source.get("path") if isinstance(source, Mapping) else source
        lines.append(f"converted by mlx-mixtral from {one_line(name)}" if name else "converted by mlx-mixtral")
    return lines


def print_plans(plans: Sequence[Mapping[str, Any]]) -> None:
    """The plans as a table, and the rates they are predicted for."""
    rows = []
    for plan in plans:
        if plan.get("problem"):
            rows.append([plan["model"], f"needs {format_bytes(plan['min_bytes'])}", *[""] * 6])
            continue
        streamed = plan["streamed_layers"]
        rows.append(
            [
                plan["model"],
                *_slots(plan),
                format_bytes(plan["resident_bytes"]),
                format_bytes(plan["kv_bytes"] + plan["working_bytes"]),
                "" if not streamed else f"{plan['hit_rate']:.0%}",
                "" if not streamed else format_bytes(plan["bytes_read_per_token"]),
                figures(plan["predicted_tok_s"]) if plan["predicted_tok_s"] else "",
            ]
        )
    columns = ["", "resident", "slots", "weights", "other", "hits", "read/token", "tok/s"]
    print_table("Under this budget", columns, rows, left=3)
    speeds = next((plan["speeds"] for plan in plans if plan.get("speeds")), None)
    if speeds is not None:
        out_console().print(
            "Resident: layers with all experts in memory; slots: expert slots of the other layers. Other: KV "
            f"cache and working memory.\nPredicted for {format_bytes(speeds['disk_bytes_per_s'])}/s of disk, "
            f"{format_bytes(speeds['memory_bytes_per_s'])}/s through the weights and "
            f"{speeds['readback_s'] * 1e6:.0f} µs to read a router's choice back from the GPU.\n",
            style="dim",
            soft_wrap=True,
        )


def _slots(plan: Mapping[str, Any]) -> tuple[str, str]:
    """Layers with all their experts in memory, and the slots of the others."""
    slots, experts = plan["slots"], plan["num_experts"]
    if not slots:
        return "all", ""
    others = sorted({count for count in slots if count < experts})
    whole = f"{sum(count == experts for count in slots)} of {len(slots)}"
    if not others:
        return whole, ""
    span = f"{others[0]}" if len(others) == 1 else f"{others[0]}-{others[-1]}"
    return whole, span


def print_settings(settings: UserSettings) -> None:
    """Where the user's defaults are from, and each of them."""
    if not settings.is_there:
        what = f"no settings: {one_line(settings.path)} is not there ({VARIABLE} names another file)"
        out_console().print(what, soft_wrap=True)
        return
    rows = [
        [f"mlx-mixtral {name}", f"--{key}", one_line(as_toml(value))]
        for name, table in settings.tables.items()
        for key, value in table.items()
    ]
    if rows:
        print_table(f"Settings of {one_line(settings.path)}", ["command", "option", "default"], rows, left=3)
    else:
        out_console().print(f"{one_line(settings.path)} sets nothing", soft_wrap=True)
