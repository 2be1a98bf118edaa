"""Saved prompts: loaded as they were, refused where they do not fit, measured before they are read."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_mixtral import Mixtral, load
from mlx_mixtral.errors import DestinationError, InvalidRequestError, PromptCacheError

from .test_prefixes import _ids


@pytest.mark.parametrize("options", [{}, {"kv_bits": 4}, {"kv_size": 64}, {"memory": "30MB"}], ids=str)
def test_saved_today_and_loaded_tomorrow(small: Path, tmp_path: Path, options: dict[str, int]) -> None:
    file = tmp_path / "prompt.cache"
    with load(small, **options) as model:  # type: ignore[arg-type]
        prompt = _ids(model, 70)
        expected = model.generate([*prompt, 9, 8, 7], max_tokens=20)
        model.save_prompt(file, prompt)
        assert [path.name for path in tmp_path.iterdir()] == ["prompt.cache"]
    with load(small, **options) as model:  # type: ignore[arg-type]
        assert model.load_prompt(file) == prompt
        found = model.generate([*prompt, 9, 8, 7], max_tokens=20)
        assert (found.stats.reused_tokens, found.token_ids) == (70, expected.token_ids)


def _rewritten(file: Path, **changes: str) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] |= changes
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def test_files_that_are_refused(own: Mixtral, small: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.cache"
    own.save_prompt(file, _ids(own, 40))
    good = file.read_bytes()

    def refused(message: str, model: Mixtral = own) -> None:
        with pytest.raises(PromptCacheError, match=message):
            model.load_prompt(file)

    _rewritten(file, version="2")
    refused("is of version 2; this program reads version 1")
    _rewritten(file, version="1", model="0" * 64)
    refused("made with another model")
    _rewritten(file, format="else")
    refused("is not a saved prompt")
    for cut in (4, 100, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:cut])
        refused(r"prompt\.cache")
    file.write_bytes(b"hello")
    refused("is not a saved prompt")
    file.unlink()
    refused("is not a saved prompt: cannot be read: No such file")
    shutil.copyfile(small / "model.safetensors", file) if (small / "model.safetensors").exists() else file.write_bytes(
        good[:9]
    )
    refused("is not a saved prompt")
    file.write_bytes(good)
    with load(small, kv_bits=8) as other:
        refused("was saved with a KV cache in float32, and this model has a KV cache of 8 bits", other)
    with load(small, prefix_cache=1000) as other:
        refused("larger prefix_cache", other)
    assert own.load_prompt(file) == _ids(own, 40)


@pytest.mark.parametrize("saved", [None, 4, 8, 16])
@pytest.mark.parametrize("own", [None, 4, 8, 16])
def test_a_prompt_of_another_kv_cache_says_what_to_give(
    small: Path, tmp_path: Path, saved: int | None, own: int | None
) -> None:
    """The advice is followed, and the prompt is loaded."""
    file = tmp_path / "prompt.cache"
    with load(small, kv_bits=saved) as model:
        model.save_prompt(file, list(range(1, 40)))
    if saved != own:
        with load(small, kv_bits=own) as model, pytest.raises(PromptCacheError) as refused:
            model.load_prompt(file)
        advice = str(refused.value).partition("load the model with ")[2].partition(",")[0]
        given = re.fullmatch(r"kv_bits=(\d+) \(--kv-bits \1\)", advice)
        assert given or advice == "no kv_bits"
        assert "Storage" not in str(refused.value)
        with load(small, kv_bits=int(given[1]) if given else None) as model:
            assert model.load_prompt(file) == list(range(1, 40))


def test_another_models_prompt_is_refused(own: Mixtral, small: Path, tmp_path: Path) -> None:
    file, copy = tmp_path / "prompt.cache", tmp_path / "model"
    own.save_prompt(file, _ids(own, 40))
    shutil.copytree(small, copy)
    weights = next(copy.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1000] ^= 1
    weights.write_bytes(data)
    with load(copy) as other, pytest.raises(PromptCacheError, match="another model"):
        other.load_prompt(file)


def test_prompts_that_cannot_be_saved(own: Mixtral, small: Path, tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match="no folder"):
        own.save_prompt(tmp_path / "none" / "prompt.cache", [1, 2, 3])
    with pytest.raises(DestinationError, match="is a folder"):
        own.save_prompt(tmp_path, [1, 2, 3])
    with pytest.raises(InvalidRequestError, match="empty"):
        own.save_prompt(tmp_path / "prompt.cache", [])
    with load(small, kv_size=16) as model, pytest.raises(InvalidRequestError, match="larger kv_size"):
        model.save_prompt(tmp_path / "prompt.cache", _ids(model, 200))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"kv_bits": 8}], ids=str)
def test_a_saved_prompt_that_is_not_finite_is_refused(
    small: Path, tmp_path: Path, value: float, options: dict[str, int]
) -> None:
    file = tmp_path / "prompt.cache"
    with load(small, **options) as model:  # type: ignore[arg-type]
        model.save_prompt(file, _ids(model, 8))
        arrays, metadata = mx.load(str(file), format="safetensors", return_metadata=True)
        name = next(name for name, array in arrays.items() if mx.issubdtype(array.dtype, mx.floating))
        arrays[name] = arrays[name].at[0, 0, 0, 0].add(value)
        mx.save_safetensors(str(tmp_path / "bent.safetensors"), arrays, metadata)
        with pytest.raises(PromptCacheError, match="is damaged: it holds NaN or infinity"):
            model.load_prompt(tmp_path / "bent.safetensors")


def test_a_saved_prompt_is_measured_before_it_is_read(own: Mixtral, tmp_path: Path) -> None:
    """Its header may promise 20 GB, in a sparse file: nothing of it is allocated."""
    file = tmp_path / "prompt.cache"
    own.save_prompt(file, _ids(own, 8))
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for bend, said in (
        (lambda entries: entries.update(more=header["tokens"]), "holds more than this model's layers"),
        (lambda entries: entries.pop("layers.0.0"), "layer 0 is not what 8 tokens produce"),
        (lambda entries: entries["tokens"].update(dtype="U32"), "holds 0 tokens"),
        (
            lambda entries: entries["layers.0.0"].update(dtype="F32", shape=[5, 2**30]),
            "layer 0 is not what 8 tokens produce",
        ),
    ):
        entries = json.loads(json.dumps(header))
        bend(entries)
        end = 0
        for name, entry in entries.items():
            if name != "__metadata__":
                nbytes = math.prod(entry["shape"]) * {"F32": 4, "BF16": 2}.get(entry["dtype"], 4)
                entry["data_offsets"] = [end, end + nbytes]
                end += nbytes
        raw = json.dumps(entries).encode()
        file.write_bytes(struct.pack("<Q", len(raw)) + raw)
        os.truncate(file, 8 + len(raw) + end)
        with pytest.raises(PromptCacheError, match=said):
            own.load_prompt(file)
