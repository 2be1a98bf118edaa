"""The rule of imports: a room imports only rooms to its left, and neither rooms nor files go in circles.

Every import counts: at the top of a file, within a function, or for type checkers only.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mlx_mixtral
import mlx_mixtral_convert

RUNTIME = Path(mlx_mixtral.__file__).parent
CONVERTER = Path(mlx_mixtral_convert.__file__).parent

ROOMS = (
    "errors", "installing", "arguments", "sizes", "reading", "leftovers", "files", "machine", "config", "model_names",
    "hub", "distributed", "weights", "adapters", "cache", "tokenizer", "constraints", "calls", "layers", "budget",
    "experts", "model", "generation", "runtime", "info", "server", "evaluation", "bench", "demo", "doctor",
    "convert.packing", "convert.output", "convert.sources", "convert.calibration", "convert.tuning", "convert.recipes",
    "convert", "convert.export", "convert.upload", "cli", "__main__",
)  # fmt: skip


def _files() -> dict[str, Path]:
    """Every module of both packages by its dotted name; ``__init__`` files stand for their packages."""
    found = {}
    for package in (RUNTIME, CONVERTER):
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = _files()


def _room(module: str) -> str | None:
    """The room a module is in; None for the surface of the runtime, which is outside of them."""
    package, *rest = module.split(".")
    if package == "mlx_mixtral":
        return rest[0] if rest else None
    inner = f"convert.{rest[0]}" if rest else "convert"
    return inner if inner in ROOMS else "convert"


def _homes(name: str) -> str:
    """Where a name of the runtime's surface is defined."""
    home = mlx_mixtral._HOMES.get(name)
    return "mlx_mixtral.errors" if home is None else f"mlx_mixtral.{home}"


def _imports(module: str) -> Iterator[str]:
    """Modules of ours that a module imports. ``from package import name`` is an import of the module where there is one."""
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            for alias in node.names:
                if node.module == "mlx_mixtral":
                    yield f"mlx_mixtral.{alias.name}" if f"mlx_mixtral.{alias.name}" in FILES else _homes(alias.name)
                elif f"{node.module}.{alias.name}" in FILES:
                    yield f"{node.module}.{alias.name}"
                elif node.module in FILES:
                    yield str(node.module)


@cache
def imports() -> dict[str, set[str]]:
    """Every module and what it imports of ours."""
    return {module: set(_imports(module)) - {module} for module in FILES if module != "mlx_mixtral"}


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """One cycle of a graph, empty when there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_room_is_listed_and_there() -> None:
    assert {_room(module) for module in imports()} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_to_its_left(room: str) -> None:
    left = ROOMS[: ROOMS.index(room) + 1]
    wrong = [
        f"{module} imports {imported}"
        for module, found in imports().items()
        if _room(module) == room
        for imported in sorted(found)
        if _room(imported) not in left
    ]
    assert not wrong, "\n".join(wrong)


def test_no_cycle_between_rooms() -> None:
    rooms = {room: set[str]() for room in ROOMS}
    for module, found in imports().items():
        own = str(_room(module))
        rooms[own] |= {str(_room(imported)) for imported in found} - {own}
    assert cycle(rooms) == []


def test_no_cycle_between_files() -> None:
    assert cycle(imports()) == []


def test_a_cycle_would_be_found() -> None:
    assert set(cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


def _classes(module: str) -> Iterator[str]:
    """Names of the classes of a module, and of types it names; those of plain numpy arrays say the same everywhere."""
    for node in ast.parse(FILES[module].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, ast.unparse(node.value)
            if name[0].isupper() and not name.isupper() and "NDArray" not in value and "TypeVar" not in value:
                yield name


def test_no_two_classes_have_the_same_name() -> None:
    found: dict[str, list[str]] = {}
    for module in imports():
        for name in _classes(module):
            found.setdefault(name, []).append(module)
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == {}
