"""Folders of MLX's first examples: npz files under Mistral's names, plain and quantised."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlx_mixtral import load
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral_convert import Recipe, convert
from mlx_mixtral_convert.sources import detect, open_source
from tests.convert.native_writer import native, params
from tests.convert.support import CONFIG, dense_config, hashes, make_checkpoint, weights

Doubles = npt.NDArray[np.float64]
TOKENS = [1, 5, 9, 33, 2, 60, 41]
HEADS, KV, SIZE = 4, 2, 32


def make_npz(
    folder: Path,
    arrays: dict[str, Any],
    config: dict[str, Any] | None = None,
    *,
    files: tuple[str, ...] = ("weights.npz",),
    save: Callable[..., None] = mx.savez,
) -> Path:
    folder.mkdir()
    entries = params(CONFIG) | {"model_type": "mixtral"} if config is None else config
    (folder / "config.json").write_text(json.dumps(entries))
    names = list(arrays)
    for number, file in enumerate(files):
        save(str(folder / file), **{name: arrays[name] for name in names[number :: len(files)]})
    return folder


def quantised(arrays: dict[str, Any], group: int, bits: int) -> tuple[dict[str, mx.array], dict[str, Doubles]]:
    """Every matrix but embedding and routers packed, as the example did, and what the packed ones mean."""
    packed: dict[str, mx.array] = {}
    meant: dict[str, Doubles] = {}
    for name, value in arrays.items():
        array = mx.array(value).astype(mx.float16)
        if value.ndim == 2 and not name.endswith("gate.weight") and not name.startswith("tok_"):
            fields = dict(zip(("weight", "scales", "biases"), mx.quantize(array, group, bits), strict=True))
            packed |= {f"{name.removesuffix('weight')}{field}": part for field, part in fields.items()}
            wide = [fields[field].astype(mx.float32) for field in ("scales", "biases")]
            array = mx.dequantize(fields["weight"], *wide, group, bits)
        else:
            packed[name] = array
        meant[name] = np.array(array.astype(mx.float32)).astype(np.float64)
    return packed, meant


def example_logits(w: dict[str, Doubles], tokens: list[int]) -> Doubles:
    """The example's network in float64: neighbouring features rotate together, two of the experts answer."""

    def norm(x: Doubles, name: str) -> Doubles:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[name]

    def turned(x: Doubles) -> Doubles:  # [L, heads, SIZE]
        angles = np.arange(len(x))[:, None] * 1e6 ** (-np.arange(0, SIZE, 2) / SIZE)
        cos, sin, out = np.cos(angles)[:, None], np.sin(angles)[:, None], np.empty_like(x)
        out[..., ::2] = x[..., ::2] * cos - x[..., 1::2] * sin
        out[..., 1::2] = x[..., ::2] * sin + x[..., 1::2] * cos
        return out

    def softmax(x: Doubles) -> Doubles:
        powers = np.exp(x - x.max(-1, keepdims=True))
        return np.asarray(powers / powers.sum(-1, keepdims=True))

    h = w["tok_embeddings.weight"][tokens]
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"layers.{layer}"
        x = norm(h, f"{at}.attention_norm.weight")
        q, k, v = (x @ w[f"{at}.attention.w{name}.weight"].T for name in "qkv")
        q, k = turned(q.reshape(-1, HEADS, SIZE)), turned(k.reshape(-1, KV, SIZE))
        k, v = (np.repeat(part.reshape(-1, KV, SIZE), HEADS // KV, axis=1) for part in (k, v))
        scores = np.einsum("lhd,mhd->hlm", q, k) / np.sqrt(SIZE) + np.triu(np.full((len(x), len(x)), -np.inf), 1)
        h = h + np.einsum("hlm,mhd->lhd", softmax(scores), v).reshape(len(x), -1) @ w[f"{at}.attention.wo.weight"].T
        x = norm(h, f"{at}.ffn_norm.weight")
        for position, (one, logits) in enumerate(zip(x, x @ w[f"{at}.feed_forward.gate.weight"].T, strict=True)):
            chosen = np.argsort(-logits)[:2]
            for share, expert in zip(softmax(logits[chosen]), chosen, strict=True):
                w1, w2, w3 = (w[f"{at}.feed_forward.experts.{expert}.w{n}.weight"] for n in (1, 2, 3))
                gate = w1 @ one
                h[position] += share * (w2 @ (gate / (1 + np.exp(-gate)) * (w3 @ one)))
    return norm(h, "norm.weight") @ w["output.weight"].T


@pytest.mark.parametrize("files", [("weights.npz",), ("weights.0.npz", "weights.1.npz", "weights.2.npz")])
def test_quantised_it_computes_what_the_example_did(tmp_path: Path, files: tuple[str, ...]) -> None:
    packed, meant = quantised(native(weights(CONFIG), CONFIG), 64, 4)
    config = params(CONFIG) | {"model_type": "mixtral", "quantization": {"group_size": 64, "bits": 4}}
    source = make_npz(tmp_path / "source", packed, config, files=files)
    assert detect(source) == "npz"
    convert(source, tmp_path / "plain", recipe=Recipe(bits=None), dtype="float32")
    report = convert(source, tmp_path / "exact", exact=True)
    assert {packing.how for packing in report.packings} == {"exact"}
    theirs = example_logits(meant, TOKENS)
    for folder in ("plain", "exact"):
        with load(tmp_path / folder, dtype="float32") as model:
            np.testing.assert_allclose(model.logits(TOKENS), theirs, atol=2e-5)


@pytest.mark.parametrize("save", [mx.savez, np.savez])
@pytest.mark.parametrize("dense", [False, True])
def test_plain_it_is_converted_as_the_same_weights_of_the_hub(
    tmp_path: Path, save: Callable[..., None], dense: bool
) -> None:
    changes = dense_config() if dense else {}
    made = weights(CONFIG | changes)
    arrays: dict[str, Any] = dict(native(made, CONFIG | changes))
    if save is mx.savez:
        arrays = {name: mx.array(value).astype(mx.bfloat16) for name, value in arrays.items()}
    else:
        # The example's w2 were transposes.
        arrays = {name: np.asfortranarray(value) if ".w2." in name else value for name, value in arrays.items()}
    config = params(CONFIG | changes) | {"rope_theta": 1e6}
    source = make_npz(tmp_path / "source", arrays, config, save=save)
    convert(source, tmp_path / "a", dtype="bfloat16")
    convert(make_checkpoint(tmp_path / "hub", **changes), tmp_path / "b")
    same = [{n: h for n, h in hashes(tmp_path / x).items() if n.endswith(".safetensors")} for x in "ab"]
    assert same[0] == same[1]


def test_names_of_the_hub_keep_the_order_of_their_rows(tmp_path: Path) -> None:
    source = make_npz(tmp_path / "source", weights(CONFIG), CONFIG, save=np.savez)
    convert(source, tmp_path / "a", dtype="bfloat16")
    convert(make_checkpoint(tmp_path / "hub"), tmp_path / "b")
    same = [{n: h for n, h in hashes(tmp_path / x).items() if n.endswith(".safetensors")} for x in "ab"]
    assert same[0] == same[1]


def test_safetensors_of_the_examples_are_read_too(tmp_path: Path) -> None:
    arrays = {name: mx.array(value) for name, value in native(weights(CONFIG), CONFIG).items()}
    source = make_npz(
        tmp_path / "source",
        arrays,
        files=("weights.00.safetensors",),
        save=lambda path, **w: mx.save_safetensors(path, w),
    )
    assert detect(source) == "npz"
    with pytest.raises(
        CheckpointError,
        match=r"holds the settings of MLX's first examples \(config\.json\), which must be converted first",
    ):
        load(source)
    convert(source, tmp_path / "out", recipe=Recipe(bits=None), dtype="float32")
    wide = {name: np.array(value).astype(np.float64) for name, value in arrays.items()}
    with load(tmp_path / "out") as model:
        np.testing.assert_allclose(model.logits(TOKENS), example_logits(wide, TOKENS), atol=2e-5)


def entry(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("norm.weight.npy", data)


def npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + data


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (
            npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"x"),
            "holds Python objects, which are not read",
        ),
        (npy("{'descr': '>f4', 'fortran_order': False, 'shape': (1,)}", b"1234"), "has type '>f4'"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", b"1234"), "needs 8 bytes, but its entry has 4"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}"), "has shape"),
        (npy("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 2, 2)}", b"1234" * 8), "is stored in column order"),
        (npy("__import__('os').getpid()"), "has a damaged header"),
        (npy("(" * 3000), "has a damaged header"),
        (npy("{'descr': '<f4'}"), "has a damaged header"),
        (b"\x93NUMPY\2\0\xff\xff\xff\x7f", "has a header of 2147483647 bytes"),
        (b"\x93NUMPY", "does not begin as numpy's arrays do"),
        (b"not numpy at all", "does not begin as numpy's arrays do"),
    ],
)
def test_bad_arrays_are_named(tmp_path: Path, data: bytes, match: str) -> None:
    source = make_npz(tmp_path / "source", {"norm.weight": mx.ones(4)})
    entry(source / "weights.npz", data)
    with pytest.raises(CheckpointError, match=f"array 'norm.weight' (.* )?{match}"):
        open_source(source)


def test_bad_files_are_named(tmp_path: Path) -> None:
    source = make_npz(tmp_path / "source", {"norm.weight": mx.ones(4)})
    entry(source / "weights.npz", npy("{}"), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed or encrypted"):
        open_source(source)
    for data in (b"", b"PK\3\4", b"not a zip"):
        (source / "weights.npz").write_bytes(data)
        with pytest.raises(CheckpointError, match="is not a readable npz file"):
            open_source(source)
    (source / "weights.npz").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4221\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_source(source)
    (source / "config.json").unlink()
    mx.savez(str(source / "weights.npz"), **{"norm.weight": mx.ones(4)})
    with pytest.raises(CheckpointError, match=r"has neither config\.json nor params\.json"):
        open_source(source)


def test_the_runtime_sends_npz_files_to_the_converter(tmp_path: Path) -> None:
    source = make_npz(tmp_path / "source", weights(CONFIG), CONFIG, save=np.savez)
    with pytest.raises(
        CheckpointError, match=r"holds files of MLX's first examples \(weights\.npz\), which must be converted first"
    ):
        load(source)
