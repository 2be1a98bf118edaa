"""mlx-lm on the same folder, timed as ours is: https://github.com/ml-explore/mlx-lm."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_mixtral.bench.backend import BatchClock, Timing
from mlx_mixtral.errors import CheckpointError, MissingDependencyError
from mlx_mixtral.installing import how_to_install

__all__ = ["MlxLm", "check_mlx_lm", "mlx_lm_version"]


def mlx_lm_version() -> str:
    """Of the installed package.

    Raises:
        MissingDependencyError: there is none, or one without what is needed here.
    """
    try:
        version = importlib.metadata.version("mlx-lm")
        from mlx_lm.generate import BatchGenerator, generate_step, generation_stream  # noqa: F401
    except (ImportError, importlib.metadata.PackageNotFoundError) as error:
        raise MissingDependencyError(
            f"comparing with mlx-lm needs mlx-lm 0.31 or later: {how_to_install('mlx-lm')} ({error})"
        ) from error
    return version


def check_mlx_lm(folder: Path, settings: Mapping[str, Any] | None = None, adapter: Path | None = None) -> None:
    """Open the folder with mlx-lm without reading weights; ``settings`` and ``adapter`` as for ``MlxLm``.

    Raises:
        MissingDependencyError: mlx-lm is not installed.
        CheckpointError: it cannot load this folder, or this adapter; its reason is in the message.
    """
    mlx_lm_version()
    _load(folder, settings, adapter, lazy=True)


def _load(folder: Path, settings: Mapping[str, Any] | None, adapter: Path | None, *, lazy: bool) -> Any:
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    loading = folder
    try:
        network = load_model(folder, lazy=lazy, model_config=dict(settings or {}))[0]
        if adapter is not None:
            loading = adapter
            network = load_adapters(network, str(adapter))
            network.eval()
        return network
    except Exception as error:  # of mlx-lm's own, whatever it is
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"mlx-lm cannot load {loading}: {type(error).__name__}: {reason}; leave out the comparison"
        ) from error


class MlxLm:
    """mlx-lm's own loops, greedy. ``in_float32`` computes in float32, where it would in the checkpoint's 16-bit type.

    ``settings`` are keys of config.json that it computes with in place of the file's; ``adapter`` is the folder of one that
    mlx-lm wrote.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any] | None = None,
        adapter: Path | None = None,
        *,
        in_float32: bool = False,
    ) -> None:
        network = _load(folder, settings, adapter, lazy=False)
        if in_float32:
            network.set_dtype(mx.float32)
        mx.eval(network.parameters())
        self._network: Any = network
        arrays = tree_flatten(network.parameters(), destination={})
        assert isinstance(arrays, dict)
        self.nbytes = sum(array.nbytes for array in arrays.values())
        self._prompt: Sequence[int] = ()
        self._cache: list[Any] = []

    def prefill(self, prompt: Sequence[int]) -> Timing:
        from mlx_lm.models.cache import make_prompt_cache

        first_s, _ = self._generate(prompt, make_prompt_cache(self._network), 1)
        return Timing(len(prompt), first_s)

    def go_to(self, prompt: Sequence[int]) -> None:
        self._prompt, self._cache = prompt, self._filled(prompt) if prompt else []

    def decode(self, tokens: int) -> Timing:
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        if (extra := self._cache[0].offset - len(self._prompt) + 1) > 0:
            if can_trim_prompt_cache(self._cache):
                trim_prompt_cache(self._cache, extra)
            else:
                self._cache = self._filled(self._prompt)
        _, rest_s = self._generate(self._prompt[-1:], self._cache, tokens + 1)
        return Timing(tokens, rest_s)

    def batch(self, prompts: Sequence[Sequence[int]], tokens: int) -> Timing | None:
        from mlx_lm.generate import BatchGenerator, generation_stream

        rows, clock = len(prompts), BatchClock(len(prompts))
        generator: Any = BatchGenerator(
            self._network, max_tokens=tokens + 1, prefill_batch_size=rows, completion_batch_size=rows
        )
        generator.insert([list(prompt) for prompt in prompts])
        while responses := generator.next_generated():
            clock.count(len(responses))
        mx.synchronize(generation_stream)
        generator.close()
        return clock.timing

    def close(self) -> None:
        self._network, self._cache = None, []
        mx.clear_cache()

    def _filled(self, prompt: Sequence[int]) -> list[Any]:
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self._network)
        for start in range(0, len(prompt) - 1, 2048):  # mlx-lm's own chunk
            self._network(mx.array([list(prompt[start : min(start + 2048, len(prompt) - 1)])]), cache=cache)
            mx.eval([layer.state for layer in cache])
        return list(cache)

    def _generate(self, prompt: Sequence[int], cache: list[Any], max_tokens: int) -> tuple[float, float]:
        """Seconds to the first token, and from there to the last."""
        from mlx_lm.generate import generate_step, generation_stream

        started = time.perf_counter()
        steps = generate_step(mx.array(list(prompt)), self._network, max_tokens=max_tokens, prompt_cache=cache)
        next(steps)
        first = time.perf_counter()
        for _ in steps:
            pass
        ended = time.perf_counter()
        mx.synchronize(generation_stream)  # mlx-lm computes one step more than it gives
        return first - started, ended - first
