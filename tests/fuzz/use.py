"""What is done with a mutated checkpoint or a file of ours besides converting: loaded, and a token or two generated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mlx_mixtral import load
from mlx_mixtral.cli.chat.conversation import Conversation
from mlx_mixtral.errors import MixtralError
from mlx_mixtral.evaluation.reference import Reference
from mlx_mixtral.evaluation.routing.analysis import analyse
from mlx_mixtral.evaluation.routing.record import RoutingRecord
from mlx_mixtral.tokenizer import load_tokenizer
from mlx_mixtral_convert.calibration.file import Calibration
from mlx_mixtral_convert.sources import open_source

__all__ = ["OWN", "use_checkpoint", "use_own"]


def use_checkpoint(folder: Path) -> None:
    """Load it, and generate; a MixtralError of either is fine."""
    for step in (_tokenizer, _generate):
        try:
            step(folder)
        except MixtralError as error:
            check_line(error)


def use_own(folder: Path, name: str) -> None:
    """Read a file of ours beside the checkpoint it belongs to. Raises MixtralError."""
    OWN[name](folder, folder / name)


def check_line(error: MixtralError) -> None:
    """Raise AssertionError for a message that is no short line."""
    assert str(error).isprintable(), f"a message with control characters: {str(error)[:300]!r}"
    assert len(str(error)) <= 520, f"a message of {len(str(error))} characters"


def _tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("some text"))


def _generate(folder: Path) -> None:
    with load(folder, context=16, memory="200MB", prefix_cache=0) as model:
        model.generate([1, 2, 3], max_tokens=2)


def _prompt(folder: Path, file: Path) -> None:
    with load(folder, context=16, prefix_cache="1MB") as model:
        model.generate([*model.load_prompt(file), 1], max_tokens=2)


def _calibration(folder: Path, file: Path) -> None:
    with open_source(folder) as source:
        Calibration.load(file).check_fits(source)


def _reference(folder: Path, file: Path) -> None:
    found = Reference(file)
    _ = found.target, found.best, found.kept(0, 4)


OWN: dict[str, Callable[[Path, Path], object]] = {
    "saved.prompt": _prompt,
    "calibration": _calibration,
    "routing.trace": lambda folder, file: analyse(RoutingRecord.load(file)),
    "reference": _reference,
    "talk.json": lambda folder, file: Conversation().load(file),
}
