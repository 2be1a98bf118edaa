"""``mlx-mixtral demo``: the whole way on the bundled checkpoint: convert to 4 bits, load, generate."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mlx_mixtral.cli.console import emit_json, out_console, rate, seconds, terminal_safe
from mlx_mixtral.cli.options import device_option, json_flag, option, takes
from mlx_mixtral.errors import DestinationError
from mlx_mixtral.sizes import format_bytes

__all__ = ["demo"]


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
    keep: Path | None = option(
        "--keep DIR", "Keep the converted model in this folder.", type=click.Path(path_type=Path)
    )
    device: str | None = device_option()
    as_json: bool = json_flag()


@click.command(short_help="See it work: convert and run a small bundled Mixtral.")
@takes(DemoOptions)
def demo(given: DemoOptions) -> None:
    """Convert the bundled checkpoint to 4 bits, load it and let it write: some seconds, nothing is downloaded.

    `tiny-mixtral` is a real Mixtral of 8.4 million parameters, trained on five languages, Python code and sums.
    """
    from mlx_mixtral.cli.convert.tables import conversion_progress
    from mlx_mixtral.cli.load import load_model
    from mlx_mixtral.demo import checkpoint_path
    from mlx_mixtral_convert import Recipe
    from mlx_mixtral_convert import convert as run

    show = _Narrator(quiet=given.as_json)
    source = checkpoint_path()
    show.line("mlx-mixtral demo", "bold")
    show.line("A real Mixtral, only small: 8.4 million parameters, 6 layers, 8 experts, 2 per")
    show.line("token. It ships with the package and was trained on the Bible in five languages,")
    show.line("Python code and sums. A real model takes the same three steps.\n")
    with _folder(given.keep) as folder, conversion_progress() as progress:
        show.step(1, f"convert to 4 bits{f' in {folder}' if given.keep else ''}")
        with _explained(given.keep):
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
    show.line("Now a real one (93 GB to download, 26.3 GB when converted):", "bold")
    show.line("  mlx-mixtral info 8x7b")
    show.line("  mlx-mixtral convert mistralai/Mixtral-8x7B-Instruct-v0.1 mixtral-4bit")
    show.line("  mlx-mixtral chat mixtral-4bit")


class _Narrator:
    """Says what happens, unless only the JSON at the end is wanted."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self._console = out_console()

    def line(self, text: str, style: str = "") -> None:
        if not self.quiet:
            self._console.print(text, style=style or None, soft_wrap=True)

    def step(self, number: int, what: str) -> None:
        self.line(f"{number}. {what}", "bold")

    def completion(self, model: Any, sample: Sample) -> dict[str, Any]:
        """Stream one completion behind its prompt, wrapped to the width of the terminal."""
        from mlx_mixtral import SamplingParams
        from mlx_mixtral.cli.streaming import completion

        sampling = SamplingParams()
        if sample.seed is not None:
            sampling = SamplingParams(temperature=0.8, top_p=0.9, seed=sample.seed)
        stream = model.stream(sample.prompt, max_tokens=sample.max_tokens, sampling=sampling, stop=sample.stop)
        self.line(f"   {sample.title}", "dim")
        writer = _Indented(self._console, self.quiet)
        writer.add(sample.prompt, "bold")
        chunks = []
        with stream:
            for chunk in stream:
                writer.add(chunk.text)
                chunks.append(chunk)
        writer.end(" …" if chunks[-1].finish_reason == "length" else "")
        return {"prompt": sample.prompt, **completion(chunks), "stats": stream.stats.to_dict()}


class _Indented:
    """Streams words indented, breaking lines at 80 columns."""

    MARGIN, WIDTH = "   ", 78

    def __init__(self, console: Any, quiet: bool) -> None:
        self._console, self._quiet = console, quiet
        self._column, self._word, self._style = 0, "", ""

    def add(self, text: str, style: str = "") -> None:
        if style != self._style:
            self._flush()
            self._style = style
        for character in terminal_safe(text):
            if character in " \n":
                self._flush()
            self._word += character
        if style:
            self._flush()

    def end(self, mark: str = "") -> None:
        self.add(mark, "dim")
        self._flush()
        self._write("\n\n")

    def _flush(self) -> None:
        word, self._word = self._word, ""
        if not word:
            return
        if word.startswith("\n"):
            self._write("\n")
            self._column, word = 0, word[1:]
        if self._column and self._column + len(word) > self.WIDTH:
            self._write("\n")
            self._column, word = 0, word.lstrip(" ")
        if not word:
            return
        if not self._column:
            word = self.MARGIN + word
        self._write(word)
        self._column += len(word)

    def _write(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, end="", style=self._style or None, soft_wrap=True)
            self._console.file.flush()


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="mlx-mixtral-demo-") as folder:
        yield Path(folder) / "tiny-mixtral-4bit"


@contextlib.contextmanager
def _explained(keep: Path | None) -> Iterator[None]:
    """What the converter says, less what does not apply here: options that ``demo`` has not, going on where it was."""
    try:
        yield
    except DestinationError as error:
        what, _, fix = str(error).rpartition("; ")
        if "--" not in fix:
            raise
        raise DestinationError(f"{what}; remove the folder or choose another one to --keep") from error
    except BaseException as error:
        if keep is None and hasattr(error, "__notes__"):
            del error.__notes__  # the folder is gone
        raise


def _device(model: Any) -> str:
    device = model.device
    return f"{device.name} (CPU backend)" if device.kind == "cpu" else str(device.name)
