"""What a user writes for an adapter, and what is meant by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlx_mixtral import AdapterSource
from mlx_mixtral.errors import InvalidRequestError


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "there", "meant"),
    [
        ("owner/lora", (), AdapterSource("owner/lora")),
        ("owner/lora=0.5", (), AdapterSource("owner/lora", scale=0.5)),
        ("owner/lora@v2=-1e-1", (), AdapterSource("owner/lora@v2", scale=-0.1)),
        ("math=owner/lora", (), AdapterSource("owner/lora", "math")),
        ("math=owner/lora=2", (), AdapterSource("owner/lora", "math", 2)),
        ("math=0.5", ("math",), AdapterSource("math", scale=0.5)),
        # What exists wins.
        ("lr=0.5", ("lr=0.5",), AdapterSource("lr=0.5")),
        ("lr=0.5", ("lr=0.5", "lr"), AdapterSource("lr=0.5")),
        ("lr=0.5=2", ("lr=0.5",), AdapterSource("lr=0.5", scale=2)),
        ("a=lr=0.5", ("lr=0.5",), AdapterSource("lr=0.5", "a")),
        ("a=lr=0.5=2", ("lr=0.5",), AdapterSource("lr=0.5", "a", 2)),
        ("a=b=c", ("b=c",), AdapterSource("b=c", "a")),
        ("a=3", ("3",), AdapterSource("3", "a")),
        ("a=~/lora=3", ("lora",), AdapterSource("~/lora", "a", 3)),
        ("x" * 300, (), AdapterSource("x" * 300)),
    ],
)
def test_an_adapter_is_a_path_with_a_name_before_and_a_scale_after(
    tmp_path: Path, text: str, there: tuple[str, ...], meant: AdapterSource
) -> None:
    for name in there:
        (tmp_path / name).mkdir()
    assert AdapterSource.parse(text) == meant


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has an empty path; give a folder"),
        ("=2", "has an empty path; give a folder"),
        ("a=", "no folder of this name"),
        ("here=", "adapter here: the scale is ''; it must be a finite number"),
        ("here=big", "adapter here: the scale is 'big'; it must be a finite number"),
        ("a=here=big", "the scale is 'big'; it must be a finite number"),
        ("here=nan", "adapter here: the scale is nan"),
        ("owner/lora=inf", "adapter owner/lora: the scale is inf"),
        ("owner/lora=big", "no folder of this name, and not [NAME=]PATH[=SCALE] with a number as scale"),
        (f"{'n' * 65}=owner/lora", "no folder of this name"),
    ],
)
def test_what_is_no_adapter_is_refused_in_a_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(InvalidRequestError) as caught:
        AdapterSource.parse(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"path": 3}, "an adapter's path is 3, of type int"),
        ({"path": "a", "name": "two words"}, "'two words' cannot be the name of an adapter"),
        ({"path": "a", "name": ""}, "'' cannot be the name of an adapter"),
        ({"path": "a", "name": 3}, "an adapter's name is 3"),
        ({"path": "a", "scale": "1"}, "adapter a: the scale is '1'"),
        ({"path": "a", "scale": True}, "adapter a: the scale is True"),
        ({"path": "a", "scale": float("nan")}, "adapter a: the scale is nan"),
        ({"path": "a", "revision": 3}, "an adapter's revision is 3"),
    ],
)
def test_wrong_arguments_are_refused_in_a_line(given: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        AdapterSource(**given)  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_a_scale_of_numpy_is_a_number() -> None:
    assert AdapterSource("a", scale=np.float32(0.5)) == AdapterSource("a", scale=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "label"),
    [
        (AdapterSource("owner/lora-math", "math"), "math"),
        (AdapterSource("owner/lora-math"), "lora-math"),
        (AdapterSource("owner/lora-math@v1.0"), "lora-math"),
        (AdapterSource("https://huggingface.co/owner/lora-math"), "lora-math"),
        (AdapterSource("my lora (2)/"), "my-lora-2-"),
        (AdapterSource("my lora (2)/.."), "home"),
        (AdapterSource(Path("absent/one")), "one"),
        (AdapterSource("/"), "adapter"),
        (AdapterSource("y" * 70), "y" * 64),
    ],
)
def test_an_adapter_without_a_name_is_called_like_the_end_of_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: AdapterSource, label: str
) -> None:
    (tmp_path / "home" / "my lora (2)").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home")
    assert source.label == label
