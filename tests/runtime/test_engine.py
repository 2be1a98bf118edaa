"""The engine as another front end would use it: public names, token ids, no text."""

from __future__ import annotations

import ast
import contextlib
import gc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_mixtral
from mlx_mixtral import Mixtral, PromptLookup, SamplingParams, load
from mlx_mixtral.errors import BusyError, ClosedError, ContextLengthError, InvalidRequestError
from mlx_mixtral.generation.request import Request
from mlx_mixtral.generation.sampling import Sampler
from mlx_mixtral.runtime.engine import Engine

PROMPT = [1, 40, 300, 21, 8]


def _request(engine: Engine, max_tokens: int = 6, params: SamplingParams | None = None, **options: object) -> Request:
    sampler = Sampler(params or SamplingParams(), PROMPT, engine.vocab_size)
    return Request(PROMPT, max_tokens, sampler, **options)  # type: ignore[arg-type]


@pytest.fixture
def engine(model: Mixtral) -> Engine:
    model.engine.prompt_cache.clear()
    return model.engine


def test_tokens_are_those_a_loop_of_whole_forwards_gives(model: Mixtral, engine: Engine) -> None:
    tokens = list(PROMPT)
    for _ in range(6):
        logits = np.asarray(model.module(mx.array([tokens], mx.int32))[0, -1])
        tokens.append(int(logits.argmax()))
    request = _request(engine)
    assert [token.token_id for token in engine.generate(request)] == tokens[len(PROMPT) :]
    assert (request.stats.prompt_tokens, request.stats.reused_tokens, request.stats.tokens) == (5, 0, 6)
    assert request.stats.peak_memory_bytes >= model.nbytes


def test_one_request_type_serves_the_loop_and_the_scheduler(engine: Engine) -> None:
    alone = [token.token_id for token in engine.generate(_request(engine, 8))]
    requests = [_request(engine, 8), _request(engine, 3)]
    found: dict[int, list[int]] = {}
    scheduler = engine.scheduler(max_rows=2)
    with engine.running():
        tickets = [scheduler.submit(request) for request in requests]
        while not scheduler.is_idle:
            for ticket, token, *_ in scheduler.step():
                if token is not None:
                    found.setdefault(ticket, []).append(token.token_id)
    assert [found[ticket] for ticket in tickets] == [alone, alone[:3]]
    assert [request.stats.tokens for request in requests] == [8, 3]


def test_it_is_busy_from_the_first_token_until_the_generator_is_closed(engine: Engine) -> None:
    first, second = engine.generate(_request(engine)), engine.generate(_request(engine))
    next(first)
    with pytest.raises(BusyError, match="already generating"):
        next(second)
    first.close()
    assert len(list(engine.generate(_request(engine, 2)))) == 2


def test_a_generator_that_is_dropped_frees_the_engine_at_once(engine: Engine) -> None:
    gc.disable()
    try:
        tokens = engine.generate(_request(engine))
        next(tokens)
        del tokens
        with engine.exclusive():
            pass
    finally:
        gc.enable()


def test_a_cache_is_kept_only_if_the_generation_was_whole(engine: Engine) -> None:
    class FailingSampler(Sampler):
        def __call__(self, logits: mx.array) -> object:  # type: ignore[override]
            if self._step == 2:
                raise KeyboardInterrupt
            return super().__call__(logits)

    prompt = list(range(2, 40))
    broken = Request(prompt, 8, FailingSampler(SamplingParams(), prompt, engine.vocab_size))
    with pytest.raises(KeyboardInterrupt):
        list(engine.generate(broken))
    assert engine.prompt_cache.take(prompt) is None
    whole = Request(prompt, 8, Sampler(SamplingParams(), prompt, engine.vocab_size))
    with contextlib.closing(engine.generate(whole)) as tokens:
        next(tokens)
    again = Request(prompt, 1, Sampler(SamplingParams(), prompt, engine.vocab_size))
    list(engine.generate(again))
    assert again.stats.reused_tokens == len(prompt) - 2


def test_speculation_is_asked_by_its_interface_alone(engine: Engine) -> None:
    repeated = [5, 6, 7, 8] * 6
    sampler = [Sampler(SamplingParams(), repeated, engine.vocab_size) for _ in range(2)]
    plain = [token.token_id for token in engine.generate(Request(repeated, 12, sampler[0]))]
    request = Request(repeated, 12, sampler[1], PromptLookup(adaptive=False))
    assert [token.token_id for token in engine.generate(request)] == plain
    assert request.stats.speculation is not None
    assert request.stats.speculation.proposed > 0


def test_other_work_runs_on_its_stream_and_excludes_generations(engine: Engine) -> None:
    with engine.computing() as context:
        assert mx.default_stream(engine.device.mlx) == engine.stream == context.stream
        with pytest.raises(BusyError):
            next(engine.generate(_request(engine)))
    assert mx.default_stream(engine.device.mlx) != engine.stream


def test_what_it_is_asked_is_checked(engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match=r"these holds token id 4096; ids go from 0 to 4095"):
        engine.checked_ids([1, 4096], "these")
    with pytest.raises(ContextLengthError, match="one must be left to generate"):
        engine.room(engine.context_limit)
    with pytest.raises(InvalidRequestError, match="max_rows is 0"):
        engine.scheduler(0)


def test_a_closed_engine_says_so(tiny: Path) -> None:
    engine = load(tiny).engine
    engine.close()
    for call in (lambda: engine.context, lambda: engine.generate(_request(engine)), lambda: engine.logits([1])):
        with pytest.raises(ClosedError, match="load it again"):
            call()


@pytest.mark.parametrize("name", ["mlx_mixtral/runtime/mixtral.py", "mlx_mixtral/bench/backend.py"])
def test_front_ends_use_nothing_private_of_it(name: str) -> None:
    path = Path(mlx_mixtral.__file__).parents[1] / name
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            assert isinstance(node.value, ast.Name), f"{name}:{node.lineno}: .{node.attr} of something else"
            assert node.value.id == "self", f"{name}:{node.lineno}: {node.value.id}.{node.attr}"


def test_a_model_says_what_it_is(model: Mixtral) -> None:
    assert repr(model).startswith("<Mixtral: 6 layers, 8 experts, 2 a token; 33.7 MB of weights in memory; ")
    shown = repr(model.module)
    assert "(embed_tokens): Linear(4096 x 128, mlx.core.float32)" in shown
    assert "(down): StackedLinear(8 x 128 x 384, mlx.core.float32)" in shown


def test_the_device_is_chosen_by_name(tiny: Path, model: Mixtral) -> None:
    with load(tiny, device="cpu") as chosen:
        assert chosen.device.kind == "cpu"
        assert chosen.engine.stream.device == mx.Device(mx.cpu)
        wanted = model.generate(PROMPT, max_tokens=4).token_ids if model.device.kind == "cpu" else None
        assert wanted in (None, chosen.generate(PROMPT, max_tokens=4).token_ids)
    with pytest.raises(InvalidRequestError, match="device 'tpu' is unknown; use gpu or cpu"):
        load(tiny, device="tpu")
    if not mx.is_available(mx.gpu):
        with pytest.raises(InvalidRequestError, match="MLX finds no GPU on this machine; use cpu"):
            load(tiny, device="gpu")


def test_a_callback_that_raises_frees_the_model_though_the_stream_is_still_held(model: Mixtral) -> None:
    def cancelled() -> bool:
        raise RuntimeError("the caller's own")

    stream = model.stream(PROMPT, max_tokens=5, cancelled=cancelled)
    with pytest.raises(RuntimeError, match="the caller's own"):
        next(stream)
    assert model.generate(PROMPT, max_tokens=2).token_ids
    assert list(stream) == []
