"""One generation at a time: streams closed, cancelled, interrupted, continued on other threads, and collisions."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from mlx_mixtral import Chunk, Mixtral, SamplingParams, load
from mlx_mixtral.errors import BusyError

SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=7)


def test_closing_a_stream_leaves_the_model_usable(model: Mixtral) -> None:
    before = model.generate("And God said", max_tokens=6).token_ids
    for steps in range(4):
        stream = model.stream("In the beginning", max_tokens=50)
        for _ in range(steps):
            next(stream)
        stream.close()
        stream.close()
        assert model.generate("And God said", max_tokens=6).token_ids == before
    with model.stream("In the beginning") as stream:
        next(stream)
    assert list(stream) == []
    dropped = model.stream("In the beginning")
    next(dropped)
    del dropped
    assert model.generate("And God said", max_tokens=6).token_ids == before


def test_cancelled_ends_with_that_reason(model: Mixtral) -> None:
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) == 3

    out = model.generate("And God said", max_tokens=50, cancelled=cancelled)
    assert (out.finish_reason, len(out.token_ids)) == ("cancelled", 3)
    assert out.text == model.generate("And God said", max_tokens=3).text


def test_interrupt_in_the_middle_leaves_the_model_usable(model: Mixtral) -> None:
    def interrupt() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate("And God said", cancelled=interrupt)
    assert model.generate("And God said", max_tokens=2).stats.tokens == 2


def test_a_second_generation_at_once_is_refused(model: Mixtral) -> None:
    with model.stream("And God said") as stream:
        next(stream)
        with pytest.raises(BusyError, match="already generating"):
            model.generate("In the beginning")
        with pytest.raises(BusyError):
            model.logits([1, 2])
        next(stream)
    assert model.generate("In the beginning", max_tokens=1).stats.tokens == 1


def test_threads_that_collide_get_an_error_and_no_wrong_text(model: Mixtral) -> None:
    wanted = model.generate("And God said", max_tokens=12).text
    results: list[str | BusyError] = []

    def work() -> None:
        for _ in range(5):
            try:
                results.append(model.generate("And God said", max_tokens=12).text)
            except BusyError as error:
                results.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = [r for r in results if isinstance(r, str)]
    assert len(results) == 20
    assert texts
    assert set(texts) == {wanted}


def test_loading_on_one_thread_and_generating_on_another(tiny: Path, model: Mixtral) -> None:
    loaded: list[Mixtral] = []
    loader = threading.Thread(target=lambda: loaded.append(load(tiny)))
    loader.start()
    loader.join()
    out: list[Any] = []
    worker = threading.Thread(
        target=lambda: out.append(loaded[0].generate("And God said", max_tokens=12, sampling=SAMPLED))
    )
    worker.start()
    worker.join()
    assert out[0].token_ids == model.generate("And God said", max_tokens=12, sampling=SAMPLED).token_ids
    loaded[0].close()


def test_a_stream_may_be_continued_on_other_threads(model: Mixtral) -> None:
    wanted = list(model.stream("And God said", max_tokens=12, sampling=SAMPLED))
    stream = model.stream("And God said", max_tokens=12, sampling=SAMPLED)
    chunks: list[Chunk] = []
    for _ in range(12):
        thread = threading.Thread(target=lambda: chunks.append(next(stream)))
        thread.start()
        thread.join()
    stream.close()
    assert chunks == wanted


def test_an_asyncio_program_keeps_its_loop_free(model: Mixtral) -> None:
    async def main() -> tuple[list[str], int]:
        ticks, texts = 0, []

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        stream = model.stream("And God said", max_tokens=8)
        while (chunk := await asyncio.to_thread(next, stream, None)) is not None:
            texts.append(chunk.text)
        ticking.cancel()
        return texts, ticks

    texts, ticks = asyncio.run(main())
    assert "".join(texts) == model.generate("And God said", max_tokens=8).text
    assert ticks > 8


def test_reading_one_stream_on_two_threads_at_once_is_refused(model: Mixtral) -> None:
    inside, leave = threading.Event(), threading.Event()

    def wait() -> bool:
        inside.set()
        leave.wait(10)
        return False

    stream = model.stream("And God said", max_tokens=4, cancelled=wait)
    thread = threading.Thread(target=lambda: next(stream))
    thread.start()
    assert inside.wait(10)
    with pytest.raises(BusyError, match="one at a time"):
        next(stream)
    leave.set()
    thread.join()
    stream.close()
