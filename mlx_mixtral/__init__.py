"""Run Mixtral, the sparse mixture-of-experts model, on your Mac.

    from mlx_mixtral import load

    model = load("mixtral-4bit")
    print(model.generate("Mixtral is", max_tokens=64).text)

Names are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from mlx_mixtral import errors
from mlx_mixtral.machine.platforms import backend_problem

if TYPE_CHECKING:
    from mlx_mixtral.adapters.source import AdapterSource
    from mlx_mixtral.cache.kv import KVCache
    from mlx_mixtral.calls.parser import ArgumentsDelta, CallBegin, CallEnd
    from mlx_mixtral.calls.turns import ToolCall
    from mlx_mixtral.config.mixtral import MixtralConfig
    from mlx_mixtral.config.quantization import QuantizationConfig, QuantizationSpec
    from mlx_mixtral.constraints.specs import Grammar, JsonObject, JsonSchema, Regex
    from mlx_mixtral.distributed.group import join_group
    from mlx_mixtral.errors import MixtralError
    from mlx_mixtral.evaluation.passkey import passkey
    from mlx_mixtral.evaluation.perplexity import evaluate
    from mlx_mixtral.evaluation.results import Evaluation
    from mlx_mixtral.evaluation.texts import Text, read_texts
    from mlx_mixtral.generation.sampling import SamplingParams
    from mlx_mixtral.generation.stats import GenerationStats
    from mlx_mixtral.runtime.batch import Batch, BatchUpdate
    from mlx_mixtral.runtime.filling import LoadProgress
    from mlx_mixtral.runtime.load import load
    from mlx_mixtral.runtime.mixtral import Mixtral
    from mlx_mixtral.runtime.requests import GenerationOptions
    from mlx_mixtral.runtime.speculation import DraftModel, PromptLookup
    from mlx_mixtral.runtime.stream import Chunk, Generation, TextStream
    from mlx_mixtral.tokenizer import Tokenizer

__all__ = [
    "AdapterSource",
    "ArgumentsDelta",
    "Batch",
    "BatchUpdate",
    "CallBegin",
    "CallEnd",
    "Chunk",
    "DraftModel",
    "Evaluation",
    "Generation",
    "GenerationOptions",
    "GenerationStats",
    "Grammar",
    "JsonObject",
    "JsonSchema",
    "KVCache",
    "LoadProgress",
    "Mixtral",
    "MixtralConfig",
    "MixtralError",
    "PromptLookup",
    "QuantizationConfig",
    "QuantizationSpec",
    "Regex",
    "SamplingParams",
    "Text",
    "TextStream",
    "Tokenizer",
    "ToolCall",
    "errors",
    "evaluate",
    "join_group",
    "load",
    "passkey",
    "read_texts",
]

__version__ = "0.1.0"

_HOMES = {
    "AdapterSource": "adapters.source",
    "ArgumentsDelta": "calls.parser",
    "Batch": "runtime.batch",
    "BatchUpdate": "runtime.batch",
    "CallBegin": "calls.parser",
    "CallEnd": "calls.parser",
    "Chunk": "runtime.stream",
    "DraftModel": "runtime.speculation",
    "Evaluation": "evaluation.results",
    "Generation": "runtime.stream",
    "GenerationOptions": "runtime.requests",
    "GenerationStats": "generation.stats",
    "Grammar": "constraints.specs",
    "JsonObject": "constraints.specs",
    "JsonSchema": "constraints.specs",
    "KVCache": "cache.kv",
    "LoadProgress": "runtime.filling",
    "Mixtral": "runtime.mixtral",
    "MixtralConfig": "config.mixtral",
    "MixtralError": "errors",
    "PromptLookup": "runtime.speculation",
    "QuantizationConfig": "config.quantization",
    "QuantizationSpec": "config.quantization",
    "Regex": "constraints.specs",
    "SamplingParams": "generation.sampling",
    "Text": "evaluation.texts",
    "TextStream": "runtime.stream",
    "Tokenizer": "tokenizer",
    "ToolCall": "calls.turns",
    "evaluate": "evaluation.perplexity",
    "join_group": "distributed.group",
    "load": "runtime.load",
    "passkey": "evaluation.passkey",
    "read_texts": "evaluation.texts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if (_problem := backend_problem()) is not None:
    # As a program (`mlx-mixtral`, `python -m mlx_mixtral`, whose argv[0] is "-m" this early): one line, no traceback.
    if PurePath(sys.argv[0] if sys.argv else "").name not in ("mlx-mixtral", "-m"):
        raise errors.UnsupportedPlatformError(_problem)
    # What is asked before anything is installed right needs no MLX.
    if sys.argv[1:2] not in (["--version"], ["-V"], ["version"]):
        sys.exit(f"error: {_problem}")
