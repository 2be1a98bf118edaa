"""A Hugging Face folder as the hub has it: experts one by one, one shard a layer, an index, and the small files.

model.layers.N.block_sparse_moe.experts.M.{w1,w3,w2}.weight     gate, up, down: what every transformers reads
model.layers.N.mlp.{gate,up,down}_proj.weight                   a dense model's only network
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from mlx_mixtral.config.layout import hf_name, matrices
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.supported import ARCHITECTURES
from mlx_mixtral.errors import DestinationError
from mlx_mixtral.files import replace_file
from mlx_mixtral_convert.export.job import Job, Result
from mlx_mixtral_convert.output.destination import MANIFEST, SPARE_BYTES, FolderDestination
from mlx_mixtral_convert.output.journal import JOURNAL, clear_folder
from mlx_mixtral_convert.output.manifest import export_text, model_config_text, write_small_files
from mlx_mixtral_convert.output.plan import INDEX_FILE, Described, Plan, ShardPlan, lay_out, shard_files
from mlx_mixtral_convert.output.write import ShardWriter
from mlx_mixtral_convert.packing.quantize import cast
from mlx_mixtral_convert.sources import small_files, tensor_place

__all__ = ["HF_TYPES", "write_hf"]

HF_TYPES = ("BF16", "F16", "F32")


def write_hf(job: Job, kind: str | None) -> Result:
    """Write the folder. ``kind`` is the safetensors type of all tensors, the source's own when None.

    Raises:
        DestinationError: the folder cannot be used, or an interrupted conversion left its work beside it.
    """
    config = job.source.config
    own = job.own_type() if kind is None else kind
    destination = FolderDestination(job.dest, job.folder, overwrite=job.overwrite)
    shards = tuple(_shards(config, own))
    plan = Plan(config, own, {matrix.path: None for matrix in matrices(config)}, shards)
    entries = {
        **job.source.entries,
        "architectures": [ARCHITECTURES[config.architecture]],
        "model_type": config.architecture,
    }
    small = small_files(job.source) | {"config.json": model_config_text(entries, plan), INDEX_FILE: plan.index()}
    needed, free = plan.output_bytes + sum(map(len, small.values())) + SPARE_BYTES, destination.free_bytes()
    if not job.dry_run:
        destination.check_space(needed)
        with destination as partial:
            _clear(partial, destination.path)
            hashes = _write(job, partial, shards, own)
            files = {shard.file: {"bytes": shard.nbytes, "sha256": hashes[shard.file]} for shard in shards}
            files |= write_small_files(partial, small)
            replace_file(partial / MANIFEST, export_text("hf", {"name": job.name, "revision": job.commit}, plan, files))
            job.finish(plan.data_bytes)
            destination.commit()
    return Result(destination.path, own, plan.output_bytes, plan.data_bytes, needed, free)


def _shards(config: MixtralConfig, kind: str) -> Iterator[ShardPlan]:
    for file, layer, own, own_norms in shard_files(config):
        described: list[Described] = [(f"{norm.path}.weight", kind, (norm.size,)) for norm in own_norms]
        for matrix in own:
            shape = (matrix.out_features, matrix.in_features)
            described += [(hf_name(matrix, expert), kind, shape) for expert in range(matrix.num_experts or 1)]
        yield lay_out(file, layer, own, own_norms, described, "pt", 8)


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
    clear_folder(partial)
