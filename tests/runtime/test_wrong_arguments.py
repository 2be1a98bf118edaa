"""Arguments of every wrong kind: each a MixtralError in one line, whatever it is; and numbers of numpy are numbers."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import DraftModel, Mixtral, PromptLookup, SamplingParams, load, passkey
from mlx_mixtral.errors import InvalidRequestError, MixtralError
from mlx_mixtral.sizes import parse_size
from mlx_mixtral_convert import Recipe, convert
from mlx_mixtral_convert.calibration import calibrate
from mlx_mixtral_convert.export import export
from mlx_mixtral_convert.upload import upload

Call = Callable[[Any], Any]
LOADING = (
    "memory", "prefix_cache", "tokenizer", "chat_template", "experts_per_token", "rope_scaling", "rope_theta", "group", "split",
    "shares", "peer_timeout_s",
)  # fmt: skip
UPLOADING = ("repository", "base_model", "licence", "report", "source", "verified")
WRONG: list[Any] = [
    object(), b"x", {1: 2}, [[1, 2]], np.zeros((2, 3), np.int32), mx.zeros((2, 2), mx.int32), mx.array([1.0, 5.0]),
    np.array([0.5]), math.inf, -math.inf, math.nan, np.float32("nan"), 10**400, -(10**400), 1j, True, print, Fraction(1, 3),
    [None], ["\ud800"], [True], [math.inf], {"a": 1}, mx.array(2.5), np.array("x"), np.datetime64(0, "s"), itertools.chain,
    Ellipsis,
]  # fmt: skip


def ids_of(model: Mixtral) -> dict[str, Call]:
    return {
        "generate": model.generate,
        "stream": model.stream,
        "logits": model.logits,
        "batch": lambda given: model.generate_batch([given]),
        "prompts": model.generate_batch,
        "chat": model.chat,
        "message": lambda given: model.chat([{"role": "user", "content": given}]),
        "trace": model.routing_trace,
    }


def options_of(model: Mixtral) -> dict[str, Call]:
    names = [name for name in inspect.signature(model.generate).parameters if name != "prompt"]
    return {name: lambda given, name=name: model.generate([1], **{"max_tokens": 1, name: given}) for name in names}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: repr(wrong)[:20])
def test_nothing_but_our_own_errors(short_model: Mixtral, short: Path, tmp_path: Path, wrong: Any) -> None:
    samplings = {
        name: lambda given, name=name: short_model.generate([1], max_tokens=1, sampling=SamplingParams(**{name: given}))
        for name in inspect.signature(SamplingParams).parameters
    }
    calls: dict[str, Call] = {
        **ids_of(short_model), **options_of(short_model), **samplings,
        "load": load,
        **{name: lambda given, name=name: load(short, **{name: given}) for name in LOADING},
        "lookup": lambda given: PromptLookup(max_ngram=given),
        "draft": lambda given: DraftModel(given),
        "set_memory": lambda given: short_model.set_memory(None, context=given),
        "recipe": lambda given: Recipe(bits=given),
        "convert": lambda given: convert(given, tmp_path / "out"),
        "dest": lambda given: convert(tmp_path, given),
        "fit": lambda given: convert(tmp_path, tmp_path / "out", fit=given),
        "length": lambda given: passkey(short_model, trials=1, lengths=[given], depths=[0.5]),
        "special": lambda given: short_model.generate([1], max_tokens=1, special=given),
        "stop of a chat": lambda given: short_model.chat([], stop=given),
        "export": lambda given: export(tmp_path, tmp_path / "out", to=given),
        "type": lambda given: export(tmp_path, tmp_path / "out", to="gguf", type=given),
        "weighed export": lambda given: export(tmp_path, tmp_path / "out", to="gguf", calibration=given),
        "calibrate": lambda given: calibrate(tmp_path, given),
        "trace of a calibration": lambda given: calibrate(tmp_path, trace=given, sensitivities=True),
        "saved calibration": lambda given: calibrate(tmp_path, save=given),
        **{name: lambda given, name=name: upload(tmp_path, **{"repository": "me/model", name: given}) for name in UPLOADING},
        "logit bias of a token": lambda given: SamplingParams(logit_bias={1: given}),
        "size": parse_size,
    }  # fmt: skip
    said: dict[str, str] = {}
    for name, call in calls.items():
        try:
            call(wrong)
        except MixtralError as error:
            said[name] = str(error)
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
    assert {name: text for name, text in said.items() if "\n" in text or len(text) > 400} == {}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.generate("x", temperature=0.5), "give it as sampling=SamplingParams(temperature=…)"),
        (
            lambda m: m.chat([], top_p=0.5),
            "chat: there is no argument 'top_p'; give it as sampling=SamplingParams(top_p=…)",
        ),
        (lambda m: m.generate("x", max_token=5), "generate: there is no argument 'max_token'; write max_tokens"),
        (lambda m: m.generate(), "generate: missing a required argument: 'prompt'"),
        (lambda m: m.generate("x", 5), "generate: too many positional arguments"),
        (lambda m: load("x", memry="1GB"), "load: there is no argument 'memry'; write memory"),
        (
            lambda m: SamplingParams(temprature=1),
            "SamplingParams: there is no argument 'temprature'; write temperature",
        ),
        (lambda m: m.generate(np.zeros((2, 3), np.int32)), "the prompt is an array of 2 dimensions; give one row"),
        (lambda m: m.logits(mx.zeros((1, 3), mx.int32)), "token_ids is an array of 2 dimensions"),
        (lambda m: m.generate(mx.array([1.0, 5.0])), "the prompt holds token id 1.0; ids go from 0 to"),
        (lambda m: SamplingParams(logit_bias=[(1, 2)]), "logit_bias is [(1, 2)], of type list; it must be a mapping"),
        (lambda m: SamplingParams(temperature=math.inf), "temperature is inf; it must be a finite number, at least 0"),
        (lambda m: parse_size(math.inf), "inf is not a size"),
        (lambda m: parse_size(0.5), "0.5 is not a size"),
    ],
)
def test_it_is_said_what_is_wrong(short_model: Mixtral, call: Call, words: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        call(short_model)
    assert words in str(raised.value)


def test_numbers_of_numpy_and_floats_of_sizes_are_taken(short_model: Mixtral) -> None:
    ids = [1, 5, 9]
    plain = short_model.generate(ids, max_tokens=4, sampling=SamplingParams(temperature=0.5, seed=3, top_k=9)).token_ids
    given = SamplingParams(temperature=np.float64(0.5), seed=np.int64(3), top_k=np.uint8(9))  # type: ignore[arg-type]
    assert type(given.top_k) is int
    for row in (np.array(ids), mx.array(ids), np.array(ids, np.uint16), [np.int32(1), mx.array(5), 9], tuple(ids)):
        assert short_model.generate(row, max_tokens=np.int64(4), sampling=given).token_ids == plain  # type: ignore[arg-type]
    assert SamplingParams(logit_bias={np.int64(2): np.float32(-1)}).logit_bias == {2: -1.0}
    assert parse_size(12e9) == parse_size(np.float64(12e9)) == parse_size(np.int64(12 * 10**9)) == parse_size("12GB")
    assert str(Recipe(bits=np.int64(4))) == str(Recipe(bits=4))  # type: ignore[arg-type]


def test_help_shows_every_option() -> None:
    for name in ("generate", "stream", "chat", "generate_batch", "stream_batch", "stream_chat"):
        parameters = inspect.signature(getattr(Mixtral, name)).parameters
        assert {"max_tokens", "sampling", "stop", "stop_token_ids", "cancelled", "on_prefill", "speculation"} <= set(
            parameters
        )
        assert not {"options", "is_answer", "tokens"} & set(parameters)
    assert inspect.signature(Mixtral.generate).parameters["max_tokens"].default == 256
    assert "max_tokens: 'int' = 256" in str(inspect.signature(Mixtral.generate))
