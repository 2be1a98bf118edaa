"""The error tree that users program against is the one written on top of the module."""

from __future__ import annotations

import re

import pytest

from mlx_mixtral import errors
from mlx_mixtral.errors import MixtralError

KINDS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}


def _documented_tree() -> dict[str, tuple[str | None, list[str]]]:
    """Name to (parent, further bases) as the module's docstring draws them."""
    assert errors.__doc__ is not None
    tree: dict[str, tuple[str | None, list[str]]] = {}
    ancestors: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        match = re.match(r"( {4}[│├└─ ]*)([A-Z]\w*Error) ", line)
        if match is None:
            continue
        column = len(match[1])
        while ancestors and ancestors[-1][0] >= column:
            ancestors.pop()
        also = re.findall(r"\(also an? (\w+)\)", line)
        tree[match[2]] = (ancestors[-1][1] if ancestors else None, also)
        ancestors.append((column, match[2]))
    return tree


def test_the_tree_in_the_docstring_is_the_real_one() -> None:
    real: dict[str, tuple[str | None, list[str]]] = {}
    for name, kind in KINDS.items():
        ours = [base.__name__ for base in kind.__bases__ if issubclass(base, MixtralError)]
        others = [base.__name__ for base in kind.__bases__ if base.__name__ not in (*ours, "Exception")]
        real[name] = (ours[0] if ours else None, others)
    assert _documented_tree() == real
    assert len(real) > 10


def test_all_is_sorted_and_names_every_error() -> None:
    assert errors.__all__ == sorted(errors.__all__)
    assert set(errors.__all__) == set(KINDS)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_error_is_caught_as_a_mixtral_error_and_says_what_it_means(name: str) -> None:
    with pytest.raises(MixtralError, match="because"):
        raise KINDS[name]("because")
    assert KINDS[name].__doc__


def test_errors_fit_the_builtin_families_callers_expect() -> None:
    assert issubclass(errors.UnsupportedPlatformError, ImportError)
    assert issubclass(errors.MissingDependencyError, ImportError)
    assert issubclass(errors.InvalidRequestError, ValueError)


@pytest.mark.parametrize("kind", KINDS.values())
def test_whatever_a_file_has_an_error_repeat_its_line_stays_short(kind: type[Exception]) -> None:
    """Cut in the middle: what is wrong stands in front, the fix at the end."""
    text = str(kind(f"config.json: {'x' * 60_000} is not a name; give another"))
    assert text.startswith("config.json: xxx")
    assert text.endswith("is not a name; give another")
    assert " … " in text
    assert len(text) < 500
    assert str(kind("x" * 500)) == "x" * 500
    assert str(kind("two\nlines\x1b[2J \ud800 é")) == "two lines\ufffd[2J \ufffd é"
