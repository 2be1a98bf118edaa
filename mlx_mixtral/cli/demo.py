"""``mlx-mixtral demo``: the whole way on the bundled checkpoint: convert to 4 bits, load, generate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_mixtral.cli.console import emit_json, out_console, rate, seconds, terminal_safe
from mlx_mixtral.cli.fields import option, takes
from mlx_mixtral.cli.options import device_option, json_flag
from mlx_mixtral.cli.several import refuse_in_group
from mlx_mixtral.errors import DestinationError
from mlx_mixtral.leftovers import scratch_folder
from mlx_mixtral.sizes import format_bytes

if TYPE_CHECKING:
    from mlx_mixtral import Mixtral

__all__ = ["demo"]

# With the margin, and room for the mark of what goes on.
TEXT_WIDTH = 75


@dataclass(frozen=True)
class Sample:
    """One completion of the demo; the same text every time on one machine."""

    title: str
    prompt: str
    max_tokens: int
    seed: int | None = None
    """Sampled at temperature 0.8 with this seed; greedy when None."""
    stop: tuple[str, ...] = ()


SAMPLES = (
    Sample("English", "And it came to pass,", 37, seed=7),
    Sample("French", "Au commencement, Dieu", 36, seed=3),
    Sample("German", "Und der HERR sprach zu Mose:", 36, seed=2),
    Sample("Python", "def __init__(self, name", 35, seed=8),
    Sample("Times tables, greedy", "10 * 6 = 60\n5 * 7 = 35\n9 * 7 =", 8, stop=("\n",)),
)


@dataclass(frozen=True)
class DemoOptions:
    keep: Path | None = option("--keep DIR", "Keep the converted model in this folder.")
    device: str | None = device_option()
    as_json: bool = json_flag()


@click.command()
@takes(DemoOptions)
def demo(given: DemoOptions) -> None:
    """Convert the bundled checkpoint to 4 bits, load it and generate text. Takes seconds and downloads nothing.

    `tiny-mixtral` is a real Mixtral of 8.4 million parameters, trained on five languages, Python code and sums.
    """
    refuse_in_group("demo", "run it on one, without mlx.launch")
    from mlx_mixtral.cli.convert.tables import conversion_progress
    from mlx_mixtral.cli.load import load_model
    from mlx_mixtral.demo import checkpoint_path
    from mlx_mixtral_convert import Recipe
    from mlx_mixtral_convert import convert as run

    show = _Narrator(quiet=given.as_json)
    source = checkpoint_path()
    show.line("mlx-mixtral demo", "bold")
    show.line("A real but small Mixtral: 8.4 million parameters, 6 layers, 8 experts, 2 per")
    show.line("token. It ships with the package and was trained on the Bible in five languages,")
    show.line("Python code and sums. A full-size model takes the same three steps.\n")
    with _folder(given.keep) as folder:
        show.step(1, f"convert to 4 bits{f' in {folder}' if given.keep else ''}")
        with _explained(given.keep), conversion_progress() as progress:
            report = run(source, folder, recipe=Recipe(bits=4), progress=progress).to_dict()
        show.line(
            f"   {format_bytes(report['source_bytes'])} in bfloat16 -> {format_bytes(report['output_bytes'])} "
            f"({report['bits_per_weight']:.2f} bits per weight) in {seconds(report['seconds'])}\n"
        )
        show.step(2, "load")
        loaded = load_model(folder)
        model = loaded.model
        show.line(f"   {format_bytes(model.nbytes)} of weights in memory in {seconds(loaded.load_s)}\n")
        show.step(3, "generate\n")
        completions = [show.completion(model, sample) for sample in SAMPLES]
    steps = sum(item["stats"]["tokens"] - 1 for item in completions)
    speed = steps / sum(item["stats"]["decode_s"] for item in completions)
    peak = max(item["stats"]["peak_memory_bytes"] for item in completions)
    if given.as_json:
        emit_json(
            {
                "convert": report,
                "load_s": loaded.load_s,
                "memory_bytes": model.nbytes,
                "decode_tok_s": speed,
                "peak_memory_bytes": peak,
                "completions": completions,
            }
        )
        return
    show.line(f"{rate(speed)}, peak memory {format_bytes(peak)}, on {_device(model)}.\n")
    show.line("Next, a full-size one (93 GB to download, 26.3 GB after conversion):", "bold")
    show.line("  mlx-mixtral info 8x7b")
    show.line("  mlx-mixtral convert mistralai/Mixtral-8x7B-Instruct-v0.1 mixtral-4bit")
    show.line("  mlx-mixtral chat mixtral-4bit")


class _Narrator:
    """Says what happens, unless only the JSON at the end is wanted."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = out_console()
        self._console.quiet = quiet

    def line(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style or None, soft_wrap=True)

    def step(self, number: int, what: str) -> None:
        self.line(f"{number}. {what}", "bold")

    def completion(self, model: Mixtral, sample: Sample) -> dict[str, Any]:
        """Stream one completion behind its prompt, indented and wrapped."""
        from rich.live import Live
        from rich.text import Text

        from mlx_mixtral import SamplingParams
        from mlx_mixtral.cli.streaming import completion

        sampling = SamplingParams()
        if sample.seed is not None:
            sampling = SamplingParams(temperature=0.8, top_p=0.9, seed=sample.seed)
        stream = model.stream(sample.prompt, max_tokens=sample.max_tokens, sampling=sampling, stop=sample.stop)
        self.line(f"   {sample.title}", "dim")
        text, chunks = Text.assemble((sample.prompt, "bold")), []

        def shown() -> Text:
            lines = text.wrap(self._console, TEXT_WIDTH)
            for line in lines:
                line.rstrip()
            return Text("\n").join(Text("   ") + line for line in lines)

        # Drawn anew with every word, and once more to stay.
        with stream, Live(console=self._console, auto_refresh=False, transient=True) as live:
            for chunk in stream:
                chunks.append(chunk)
                text.append(terminal_safe(chunk.text))
                live.update(shown(), refresh=True)
        if chunks[-1].finish_reason == "length":
            text.append(" …", "dim")
        self._console.print(shown(), "", sep="\n", soft_wrap=True)
        return {"prompt": sample.prompt, **completion(chunks), "stats": stream.stats.to_dict()}


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        yield keep
        return
    with scratch_folder("demo") as folder:
        yield folder / "tiny-mixtral-4bit"


@contextlib.contextmanager
def _explained(keep: Path | None) -> Iterator[None]:
    """What the converter says, less what does not apply here: options that ``demo`` has not, going on where it was."""
    try:
        yield
    except DestinationError as error:
        what, _, fix = str(error).rpartition("; ")
        if "--" not in fix:
            raise
        raise DestinationError(f"{what}; remove the folder or choose another one for --keep") from error
    except BaseException as error:
        if keep is None and hasattr(error, "__notes__"):
            del error.__notes__  # the folder is gone
        raise


def _device(model: Mixtral) -> str:
    device = model.device
    return f"{device.name} (CPU backend)" if device.kind == "cpu" else str(device.name)
