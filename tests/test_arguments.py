"""Values of the wrong Python type, given to the public functions: one clear error that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_mixtral import Mixtral, load
from mlx_mixtral.arguments import as_path
from mlx_mixtral.errors import ConfigError, InvalidRequestError, MixtralError
from mlx_mixtral_convert import Calibration, Recipe, calibrate, convert, named_recipe, verify
from mlx_mixtral_convert.export import export

NO_PATHS = [None, 5, 1.5, b"folder", ["folder"], {"a": 1}, True]

# (what is called with a value, how the message begins)
PATHS: dict[str, tuple[Callable[[Any, Path], object], str]] = {
    "load": (lambda value, _: load(value), "path is"),
    "convert": (lambda value, out: convert(value, out), "source is"),
    "convert to": (lambda value, _: convert("source", value), "dest is"),
    "export": (lambda value, out: export(value, out, to="hf"), "source is"),
    "export to": (lambda value, _: export("source", value, to="hf"), "dest is"),
    "calibrate": (lambda value, _: calibrate(value), "source is"),
    "verify": (lambda value, _: verify(value), "folder is"),
    "a calibration": (lambda value, _: Calibration.load(value), "calibration is"),
}


@pytest.mark.parametrize("value", NO_PATHS, ids=repr)
def test_what_is_no_path_is_named_with_its_type(value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        as_path("path", value)
    said = str(caught.value)
    assert said.startswith("path is")
    assert repr(value) in said
    assert type(value).__name__ in said


@pytest.mark.parametrize("call", PATHS)
def test_every_function_checks_its_paths_first(tmp_path: Path, call: str) -> None:
    run, begins = PATHS[call]
    with pytest.raises(InvalidRequestError, match=f"^{begins} 5, of type int"):
        run(5, tmp_path / "out")
    with pytest.raises(InvalidRequestError, match=f"^{begins} '~nobody-here/x', but there is no user '~nobody-here'"):
        run("~nobody-here/x", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_is_the_users_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path("path", "~/model") == tmp_path / "model"
    assert as_path("path", Path("~/model")) == tmp_path / "model"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": "5"}, r"max_tokens is '5'; it must be an integer"),
        (
            {"sampling": {"temperature": 1}},
            r"sampling is \{'temperature': 1\}, of type dict; it must be SamplingParams",
        ),
        ({"stop": 5}, r"stop is 5, of type int; it must be text, or a list of texts"),
        ({"stop": b"x"}, r"stop is b'x'"),
        ({"stop": [5]}, r"stop string 5"),
        ({"stop_token_ids": 5}, r"stop_token_ids is int"),
        ({"cancelled": True}, r"cancelled is True, of type bool; it must be a function, or None"),
        ({"on_prefill": 5}, r"on_prefill is 5"),
    ],
)
def test_options_of_a_generation(model: Mixtral, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{message}"):
        model.generate("And", **options)


@pytest.mark.parametrize("prompt", [None, 3, b"And", bytearray(b"And")], ids=lambda p: type(p).__name__)
def test_a_prompt_is_text_or_token_ids(model: Mixtral, prompt: Any) -> None:
    message = rf"{type(prompt).__name__}, not text or a list of token ids"
    with pytest.raises(InvalidRequestError, match=f"^the prompt is {message}"):
        model.generate(prompt)
    with pytest.raises(InvalidRequestError, match=f"^token_ids is {message}"):
        model.logits(prompt)


def test_token_ids_may_come_from_anything_that_has_them(model: Mixtral) -> None:
    ids = model.tokenizer.encode("And there was")
    expected = model.generate(ids, max_tokens=3).token_ids
    for given in (tuple(ids), np.array(ids), iter(ids)):
        assert model.generate(given, max_tokens=3).token_ids == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "message"),
    [(None, "ids is None"), (5, "ids is 5"), (["a"], "a token id is 'a'"), ([1.5], r"a token id is 1\.5"), ([[1]], "a to")],
)  # fmt: skip
def test_what_cannot_be_decoded(model: Mixtral, ids: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{message}"):
        model.tokenizer.decode(ids)


@pytest.mark.parametrize("context", [0, "4k"])
def test_another_budget_for_no_number_of_tokens(model: Mixtral, context: Any) -> None:
    with pytest.raises(InvalidRequestError, match="context is"):
        model.set_memory(None, context=context)


@pytest.mark.parametrize("value", [None, 5])
def test_texts_of_a_trace(model: Mixtral, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"^texts is"):
        model.routing_trace(value)


def test_progress_of_loading_is_checked_before_the_weights_are_read(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_mixtral.runtime.filling.fill", None)
    with pytest.raises(InvalidRequestError, match=r"^progress is 5, of type int; it must be a function, or None"):
        load(tiny, progress=5)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=r"^revision is 5"):
        load("owner/name", revision=5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": {"bits": 4}}, r"recipe is \{'bits': 4\}, of type dict; it must be a Recipe, or None"),
        ({"calibration": 5}, "calibration is 5"),
        ({"progress": 5}, "progress is 5"),
        ({"cancelled": True}, "cancelled is True"),
        ({"dtype": []}, r"dtype \[\] is unknown"),
        ({"kind": 5}, "source kind 5 is unknown"),
        ({"fit": []}, r"\[\] is not a size"),
        ({"revision": 5}, "revision is 5"),
    ],
)
def test_options_of_a_conversion(tiny: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{message}"):
        convert(tiny, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda folder, out: export(folder, out, to=5), "export to 5 is unknown"),
        (lambda folder, out: export(folder, out, to=[]), r"export to \[\] is unknown"),
        (lambda folder, out: export(folder, out, to="hf", type=[]), r"type \[\] is unknown"),
        (lambda folder, out: export(folder, out, to="hf", progress=5), "progress is 5"),
        (lambda folder, _: verify(folder, progress=5), "progress is 5"),
        (lambda folder, _: calibrate(folder, tokens="all"), "tokens is 'all'"),
        (lambda folder, _: calibrate(folder, "text.txt"), r"texts is 'text\.txt'"),
        (lambda folder, _: calibrate(folder, progress=5), "progress is 5"),
        (lambda *_: named_recipe(5), "name_or_file is 5"),  # type: ignore[arg-type]
    ],
)
def test_options_of_the_other_functions(tiny: Path, tmp_path: Path, run: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{message}"):
        run(tiny, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "4"}, "bits is '4', not an integer"),
        ({"bits": True}, "bits is True, not an integer"),
        ({"group_size": "64"}, "group_size is '64', not an integer"),
        ({"overrides": 5}, "overrides is 5; it must map patterns"),
        ({"overrides": {5: None}}, r"overrides is \{5: None\}; it must map patterns"),
    ],
)
def test_values_of_a_recipe(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**options)


def test_a_long_value_is_cut_and_on_one_line() -> None:
    with pytest.raises(MixtralError) as caught:
        as_path("path", np.zeros((40, 40)))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 160
