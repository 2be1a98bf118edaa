"""A Hugging Face folder as the hub has it: experts one by one, one shard a layer, an index, and the small files.

model.layers.N.block_sparse_moe.experts.M.{w1,w3,w2}.weight     gate, up, down: what every transformers reads
model.layers.N.mlp.{gate,up,down}_proj.weight                   a dense model's only network
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any

from mlx_mixtral import __version__
from mlx_mixtral.config.layout import hf_name, matrices, norms
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.supported import ARCHITECTURES
from mlx_mixtral.errors import DestinationError
from mlx_mixtral.files import replace_file
from mlx_mixtral.weights.safetensors import ITEM_BYTES
from mlx_mixtral_convert.export.job import Job, Result
from mlx_mixtral_convert.output.destination import MANIFEST, FolderDestination
from mlx_mixtral_convert.output.journal import JOURNAL
from mlx_mixtral_convert.output.manifest import DTYPE_NAMES, write_small_files
from mlx_mixtral_convert.output.plan import INDEX_FILE, Plan, ShardPlan, TensorPlan
from mlx_mixtral_convert.output.write import ShardWriter
from mlx_mixtral_convert.packing.quantize import cast
from mlx_mixtral_convert.sources import tensor_place

__all__ = ["HF_TYPES", "write_hf"]

HF_TYPES = ("BF16", "F16", "F32")
# conversion.json, the file system's own blocks.
SPARE_BYTES = 2**20
# What described the source's packing, or the machine it lay on.
_DROPPED = ("quantization", "quantization_config", "compression_config", "_name_or_path")


def write_hf(job: Job, kind: str | None) -> Result:
    """Write the folder. ``kind`` is the safetensors type of all tensors, the source's own when None.

    Raises:
        DestinationError: the folder cannot be used, or an interrupted conversion left its work beside it.
    """
    config = job.source.config
    own = job.own_type() if kind is None else kind
    destination = FolderDestination(job.dest, job.folder, overwrite=job.overwrite)
    shards = tuple(_shards(config, own))
    plan = Plan(config, own, {}, shards)
    small = job.small_files()
    small |= {"config.json": _config_text(job.source.entries, config, own), INDEX_FILE: plan.index()}
    needed, free = plan.output_bytes + sum(map(len, small.values())) + SPARE_BYTES, destination.free_bytes()
    if not job.dry_run:
        destination.check_space(needed)
        with destination as partial:
            _clear(partial, destination.path)
            hashes = _write(job, partial, shards, own)
            files = {shard.file: {"bytes": shard.nbytes, "sha256": hashes[shard.file]} for shard in shards}
            files |= write_small_files(partial, small)
            replace_file(partial / MANIFEST, _manifest_text(job, own, plan, files))
            job.finish(plan.data_bytes)
            destination.commit()
    return Result(destination.path, own, plan.output_bytes, plan.data_bytes, needed, free)


def _shards(config: MixtralConfig, kind: str) -> Iterator[ShardPlan]:
    layers: list[int | None] = [*range(config.num_hidden_layers), None]
    for number, layer in enumerate(layers, start=1):
        own = tuple(matrix for matrix in matrices(config) if matrix.layer == layer)
        own_norms = tuple(norm for norm in norms(config) if norm.layer == layer)
        shapes: dict[str, tuple[int, ...]] = {f"{norm.path}.weight": (norm.size,) for norm in own_norms}
        for matrix in own:
            for expert in range(matrix.num_experts or 1):
                shapes[hf_name(matrix, expert)] = (matrix.out_features, matrix.in_features)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            size = prod(shape) * ITEM_BYTES[kind]
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        tensors, offset = {}, 8 + len(raw)
        for name, shape in shapes.items():
            tensors[name] = TensorPlan(name, kind, shape, offset, prod(shape) * ITEM_BYTES[kind])
            offset += tensors[name].nbytes
        file = f"model-{number:05}-of-{len(layers):05}.safetensors"
        yield ShardPlan(file, layer, struct.pack("<Q", len(raw)) + raw, tensors, own, own_norms)


def _write(job: Job, folder: Path, shards: tuple[ShardPlan, ...], kind: str) -> dict[str, str]:
    """sha256 of every shard by file name."""
    hashes: dict[str, str] = {}
    with closing(job.values([matrix for shard in shards for matrix in shard.matrices])) as walk:
        for shard in shards:
            with ShardWriter(folder, shard) as out:
                for norm in shard.norms:
                    typed = cast(job.source.read_norm(norm), kind, tensor_place(job.source, norm))
                    out.append(f"{norm.path}.weight", typed.array)
                for _ in range(sum(matrix.num_experts or 1 for matrix in shard.matrices)):
                    matrix, expert, values = next(walk)
                    typed = cast(values, kind, tensor_place(job.source, matrix, expert))
                    out.append(hf_name(matrix, expert), typed.array)
                hashes[shard.file] = out.finish()
        # To its end, which tells the caller of the last matrix.
        assert next(walk, None) is None
    return hashes


def _clear(partial: Path, dest: Path) -> None:
    """Remove what a killed export left; a conversion's unfinished work is not ours."""
    if (partial / JOURNAL).exists():
        raise DestinationError(
            f"{dest} has an unfinished conversion to MLX; finish it, or give another destination for the export"
        )
    for entry in partial.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _config_text(entries: Mapping[str, Any], config: MixtralConfig, kind: str) -> bytes:
    written = {key: value for key, value in entries.items() if key not in _DROPPED}
    written |= {"architectures": [ARCHITECTURES[config.architecture]], "model_type": config.architecture}
    spelled = [key for key in ("torch_dtype", "dtype") if key in written] or ["torch_dtype"]
    written |= dict.fromkeys(spelled, DTYPE_NAMES[kind])
    # Older releases of transformers read this spelling only.
    written.setdefault("rope_theta", config.rope.theta)
    return (json.dumps(written, indent=2, ensure_ascii=False) + "\n").encode()


def _manifest_text(job: Job, kind: str, plan: Plan, files: Mapping[str, Mapping[str, Any]]) -> bytes:
    """conversion.json, by which a later export knows the folder as one it may replace. No times: two runs give the same."""
    manifest = {
        "converter": {"name": "mlx-mixtral", "version": __version__},
        "export": "hf",
        "source": {"name": job.name, "revision": job.commit},
        "dtype": DTYPE_NAMES[kind],
        "parameters": plan.parameters,
        "files": {name: files[name] for name in sorted(files)},
    }
    return (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
