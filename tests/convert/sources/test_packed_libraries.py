"""Folders that libraries quantised and saved: the weights mean what the library itself makes of them.

``tests/goldens/record_packed.py`` wrote them, and the logits of each library's own weights in float32.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlx_mixtral_convert import Recipe, convert, verify
from mlx_mixtral_convert.sources import detect
from tests.convert.support import Floats

GOLDENS = Path(__file__).parents[2] / "goldens" / "packed"
WRITTEN_BY: dict[str, str] = json.loads((GOLDENS / "cases.json").read_text())
TOKENS = mx.array([[1, 5, 9, 30, 2, 17, 8, 31]])
# The kind it is read as.
KINDS = {
    "llm-compressor": "compressed-tensors",
    "compressed-tensors": "compressed-tensors",
    "transformers": "fp8",
    "modelopt": "modelopt",
    "bitsandbytes": "bitsandbytes",
}
# What --exact makes of each: the packing, how it came to it, and what rounding may change of a logit. Most scales of bfloat16
# are float16's too.
SAME = 1e-6
EXACT = {
    "mxfp4": ("mxfp4", "exact", SAME),
    "mxfp8": ("mxfp8", "exact", SAME),
    "mxfp6": ("8-bit g32", "exact", SAME),
    "int3-group": ("3-bit g32", "rounded", SAME),
    "int4-group": ("4-bit g32", "rounded", SAME),
    "int8-channel": ("8-bit g32", "rounded", SAME),
    "int8-w8a8": ("8-bit g32", "rounded", SAME),
    "int4-group-asymmetric": ("4-bit g32", "rounded", 1e-3),
    "bnb-int8": ("8-bit g32", "rounded", 1e-3),
}
REQUANTISED = ("8-bit g32", "requantised", 0.02)


def logits(folder: Path) -> Floats:
    model = load_model(folder)[0]
    model.set_dtype(mx.float32)
    return np.array(model(TOKENS))[0]


def wrong(folder: Path, case: str) -> float:
    with np.load(GOLDENS / "logits.npz") as meant:
        return float(np.abs(logits(folder) - meant[case]).max())


@pytest.mark.parametrize("case", WRITTEN_BY)
def test_the_weights_are_those_the_library_makes_of_them(tmp_path: Path, case: str) -> None:
    assert detect(GOLDENS / case) == KINDS[WRITTEN_BY[case].split()[0]]
    report = convert(GOLDENS / case, tmp_path / "out", recipe=Recipe(bits=None), dtype="float32")
    difference = wrong(tmp_path / "out", case)
    print(f"{case}: {WRITTEN_BY[case]}, largest difference {difference:.2g}")
    assert difference < SAME
    cache = [note for note in report.notes if "scales for a quantised KV cache" in note]
    assert len(cache) == (case in ("fp8-channel", "modelopt-fp8"))


def test_mxfp4_of_modelopt_is_the_same_under_other_names(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDENS / "mxfp4", source)
    tensors = mx.load(str(source / "model.safetensors"))
    assert isinstance(tensors, dict)
    renamed = {name.replace("weight_packed", "weight"): array for name, array in tensors.items()}
    mx.save_safetensors(str(source / "model.safetensors"), renamed)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "mxfp4"}
    (source / "config.json").write_text(json.dumps(config))
    report = convert(source, tmp_path / "out", exact=True)
    assert [(packing.spec, packing.how) for packing in report.packings] == [("mxfp4", "exact")]
    assert wrong(tmp_path / "out", "mxfp4") < SAME


@pytest.mark.parametrize("case", WRITTEN_BY)
def test_exact_keeps_what_mlx_has_a_packing_for_and_rounds_the_rest_into_8_bits(tmp_path: Path, case: str) -> None:
    spec, how, most = EXACT.get(case, REQUANTISED)
    report = convert(GOLDENS / case, tmp_path / "out", exact=True)
    assert verify(tmp_path / "out").ok
    difference, found = wrong(tmp_path / "out", case), report.packings
    print(f"{case}: {found}, largest difference {difference:.2g}, {report.output_bytes} bytes")
    assert {packing.spec for packing in found} == {spec}
    assert how in {packing.how for packing in found}
    assert difference < most
    if most == SAME:
        assert all(packing.relative_rms == 0 for packing in found)
    if how == "requantised":
        assert 0 < max(packing.relative_rms or 0 for packing in found) < 0.01
