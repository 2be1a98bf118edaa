"""The package's surface: what it exports, what importing it costs, and which way imports may point."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import mlx_mixtral

PACKAGE = Path(mlx_mixtral.__file__).parent


@cache
def runtime() -> dict[str, ast.Module]:
    """Every module but the command line's."""
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
        if "cli" not in path.relative_to(PACKAGE).parts
    }


def _type_checking_imports() -> dict[str, str]:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    )
    return {
        alias.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_all_is_sorted_and_without_repeats() -> None:
    assert mlx_mixtral.__all__ == sorted(set(mlx_mixtral.__all__))


@pytest.mark.parametrize("name", mlx_mixtral.__all__)
def test_every_public_name_can_be_imported_and_is_listed(name: str) -> None:
    assert getattr(mlx_mixtral, name) is not None
    assert name in dir(mlx_mixtral)


def test_type_checkers_see_the_names_the_runtime_gives() -> None:
    seen = _type_checking_imports()
    assert set(seen) | {"errors"} == set(mlx_mixtral.__all__)
    assert seen == {name: f"mlx_mixtral.{home}" for name, home in mlx_mixtral._HOMES.items()}


@pytest.mark.parametrize(("name", "home"), sorted(mlx_mixtral._HOMES.items()))
def test_a_public_name_is_public_where_it_lives(name: str, home: str) -> None:
    module = importlib.import_module(f"mlx_mixtral.{home}")
    assert getattr(mlx_mixtral, name) is getattr(module, name)
    assert name in module.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'generate'"):
        _ = mlx_mixtral.generate


def _modules_after(statement: str) -> set[str]:
    script = f"import sys\nsys.path.insert(0, {str(PACKAGE.parent)!r})\n{statement}\nprint(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


def test_importing_the_package_imports_neither_mlx_nor_numpy() -> None:
    loaded = _modules_after("import mlx_mixtral")
    assert "mlx_mixtral.machine.platforms" in loaded
    assert not {"mlx.core", "numpy", "jinja2", "sentencepiece", "huggingface_hub", "click"} & loaded


def test_a_public_name_brings_mlx_when_it_is_first_used() -> None:
    assert "mlx.core" in _modules_after("from mlx_mixtral import load")
    assert "mlx.core" not in _modules_after("from mlx_mixtral import MixtralConfig, QuantizationSpec")


def test_what_only_some_models_need_is_not_imported_with_load() -> None:
    some = {"huggingface_hub", "httpx", "jinja2", "sentencepiece", "tokenizers", "gguf", "matplotlib", "torch"}
    assert not (some | {"transformers", "mlx_lm", "asyncio", "click"}) & _modules_after("from mlx_mixtral import load")


def test_loading_never_imports_the_converter_or_the_cli() -> None:
    loaded = _modules_after("import mlx_mixtral\nfor name in mlx_mixtral.__all__: getattr(mlx_mixtral, name)")
    assert not {name for name in loaded if name.startswith(("mlx_mixtral_convert", "mlx_mixtral.cli", "rich"))}


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module)


def test_the_runtime_imports_neither_the_converter_nor_the_cli() -> None:
    far = ("mlx_mixtral_convert", "mlx_mixtral.cli", "rich", "click")
    found = [(path, name) for path, tree in runtime().items() for name in _imports(tree) if name.startswith(far)]
    assert {path for path, _ in found} == {"__main__.py"}, found  # the program itself


def test_the_runtime_never_prints_and_reads_no_environment() -> None:
    """But for what MLX's launcher says of a group, which is asked where a program joins it."""
    found = []
    for path, tree in runtime().items():
        if path == "distributed/environment.py":
            continue
        for node in ast.walk(tree):
            names: set[str] = set()
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = {node.func.id} & {"print", "input", "breakpoint"}
            elif isinstance(node, ast.Attribute):
                names = {node.attr} & {"environ", "getenv"}
            elif isinstance(node, ast.ImportFrom) and node.module == "os":
                names = {alias.name for alias in node.names} & {"environ", "getenv"}
            found += [f"{path}:{getattr(node, 'lineno', 0)} {name}" for name in names]
    assert found == []


def test_every_module_opens_with_what_it_is() -> None:
    assert len(runtime()) > 100
    assert [path for path, tree in runtime().items() if not ast.get_docstring(tree)] == []
