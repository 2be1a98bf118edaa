"""Messages about a tensor's values name the file it lies in, for every layout."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_mixtral.config.layout import matrices, norms
from mlx_mixtral.errors import MixtralError, NonFiniteWeightsError
from mlx_mixtral_convert import convert
from mlx_mixtral_convert.export import export
from mlx_mixtral_convert.sources import open_source
from tests.convert.sources.test_streamed_kinds import KINDS
from tests.convert.support import EXPERT, Tensors, make_checkpoint

NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(("make", "file"), [kind[1:3] for kind in KINDS], ids=[kind[1].__name__ for kind in KINDS])
def test_a_tensor_lies_in_the_file_that_has_its_name(tmp_path: Path, make: Callable[[Path], None], file: str) -> None:
    folder = tmp_path / "source"
    make(folder)
    held = {path: path.read_bytes() for path in folder.iterdir() if path.name not in ("config.json", "params.json")}
    seen = set()
    with open_source(folder / file.removeprefix(":")) as source:
        places = [(matrix, e) for matrix in matrices(source.config) for e in range(matrix.num_experts or 1)]
        for item, expert in [*places, *((norm, 0) for norm in norms(source.config))]:
            # Every format writes names as they are; those of packed modules have several endings.
            name = re.sub(r"\[\d+\]$", "", source.name(item, expert)).removesuffix(".weight").encode()
            pattern = re.compile(rb"(?<![\w.])" + re.escape(name))
            found = source.file(item, expert)
            assert pattern.search(held[found]), (found, name)
            seen.add(found)
        assert seen == set(source.files.paths)


@pytest.mark.parametrize("name", [EXPERT, NORM])
@pytest.mark.parametrize(
    "run",
    [
        lambda source, out: convert(source, out),
        lambda source, out: convert(source, out, dtype="float32"),
        lambda source, out: export(source, out, to="hf"),
        lambda source, out: export(source, out, to="hf", type="F32"),
    ],
    ids=["quantised", "cast", "exported", "exported and cast"],
)
def test_nan_is_reported_with_the_shard_it_is_in(tmp_path: Path, run: Callable[[Path, Path], Any], name: str) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[name].flat[3] = np.nan

    source = make_checkpoint(tmp_path / "source", shards=3, edit=edit)
    shard = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"][name]
    place = re.escape(f"{source / shard}: tensor '{name}' holds NaN or infinity")
    with pytest.raises(NonFiniteWeightsError, match=f"^{place}"):
        run(source, tmp_path / "out")


def test_values_beyond_the_type_are_reported_with_their_shard(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[EXPERT].flat[3] = 70000

    source = make_checkpoint(tmp_path / "source", shards=3, edit=edit)
    shard = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"][EXPERT]
    with pytest.raises(MixtralError, match=f"^{re.escape(f'{source / shard}: tensor {EXPERT!r} holds')}"):
        convert(source, tmp_path / "out", dtype="float16")
