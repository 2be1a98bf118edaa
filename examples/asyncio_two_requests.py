"""Two requests take turns on one model in an asyncio program; the second is cancelled halfway.

python examples/asyncio_two_requests.py [MODEL]
"""

import asyncio
import sys
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor

from mlx_mixtral import Chunk, Mixtral, SamplingParams, load
from mlx_mixtral.demo import checkpoint_path

MODEL = sys.argv[1] if len(sys.argv) > 1 else checkpoint_path()


async def stream(model: Mixtral, turn: asyncio.Lock, prompt: str) -> AsyncGenerator[Chunk, None]:
    # A model runs one generation at a time, so requests wait for their turn.
    async with turn:
        chunks = model.stream(prompt, max_tokens=48, sampling=SamplingParams(temperature=0.8, seed=5))
        try:
            while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
                yield chunk
        finally:
            chunks.close()  # cancels if the consumer left early


async def request(name: str, model: Mixtral, turn: asyncio.Lock, prompt: str, enough: int) -> None:
    text, count, reason = "", 0, "cancelled"
    answer = stream(model, turn, prompt)
    async for chunk in answer:
        text, count, reason = text + chunk.text, count + 1, chunk.finish_reason or reason
        if count == enough:
            break
    await answer.aclose()
    print(f"{name} ({count} tokens, {reason}): {prompt}{text}")


async def main() -> None:
    # Generation blocks, so it runs on a worker thread: a single one, because MLX keeps a stream for every thread that computes.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    model, turn = await asyncio.to_thread(load, MODEL), asyncio.Lock()
    await asyncio.gather(
        request("first", model, turn, "And God said", enough=1000),
        request("second", model, turn, "Au commencement", enough=10),
    )
    model.close()


asyncio.run(main())
