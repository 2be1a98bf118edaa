"""``info --machines``: one model on several Macs, what each would hold, whether it fits, and the predicted speed.

Nothing here is measured: sizes are arithmetic, bandwidths and latencies published ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mixtral.arguments import shown
from mlx_mixtral.budget.needs import RESIDENT_CHUNK_TOKENS, MemoryNeeds
from mlx_mixtral.budget.slots import Speeds
from mlx_mixtral.config.layout import matrices
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.overrides import ConfigOverrides
from mlx_mixtral.errors import CheckpointError, InvalidRequestError, MemoryBudgetError
from mlx_mixtral.info.estimate import BUILT_IN, PARTS, WIDTHS, bytes_by_part
from mlx_mixtral.info.links import LinkSpeed, find_link
from mlx_mixtral.info.macs import CHIPS, Chip, usable_bytes
from mlx_mixtral.info.plans import DEFAULT_DISK, READBACK_S, mac_planner, one_chip, sizes_of
from mlx_mixtral.info.splits import BANDWIDTH_SHARE, SPLITS, Held, ModelParts, decoding_rate, token_bytes
from mlx_mixtral.sizes import parse_size

__all__ = ["Cluster", "checkpoint_machines", "shape_machines"]

ASSUMED_CHIP = Chip("a chip of 400 GB/s", 400)
"""Where none is named: M1 Max, M2 Max, the larger M3 Max."""
MAX_MEMORY_GIB = 4096


@dataclass(frozen=True)
class Cluster:
    """Macs of one chip and what connects them.

    Args:
        memories_gib: of each, the leader first.
        speeds: what one of them reads from memory and from its disk.
    """

    memories_gib: tuple[int, ...]
    link: LinkSpeed
    chip: Chip
    speeds: Speeds

    @classmethod
    def parse(cls, memories: str, link: str | None, chips: Sequence[Chip], disk: str | None) -> Cluster:
        """Of texts as users write them: ``"64GB,64GB"`` are Macs as they are sold, of 64 GiB. All chips mean none was named.

        Raises:
            InvalidRequestError: not the memories of at least two machines, several chips, an unknown link, no size of a disk.
        """
        chip = ASSUMED_CHIP if chips == CHIPS else one_chip(chips, "a plan for --machines")
        speeds = Speeds(float(parse_size(disk or DEFAULT_DISK)), decoding_rate(chip.bandwidth_gb_s), READBACK_S)
        return cls(_parse_memories(memories), find_link(link), chip, speeds)

    @property
    def usable_bytes(self) -> list[int]:
        """What the GPU of each may use."""
        return [usable_bytes(memory) for memory in self.memories_gib]


def _parse_memories(text: str) -> tuple[int, ...]:
    found = []
    for name in (part.strip() for part in text.split(",")):
        match = re.fullmatch(r"(\d{1,9})\s*(?:g|gb|gib)", name, re.IGNORECASE)
        if match is None or not 1 <= int(match[1]) <= MAX_MEMORY_GIB:
            raise InvalidRequestError(
                f"--machines: {shown(name)} is not the memory of a machine; write 1GB to {MAX_MEMORY_GIB}GB for each, such as "
                "64GB,64GB"
            )
        found.append(int(match[1]))
    if len(found) < 2:
        raise InvalidRequestError(
            f"--machines: {shown(text)} is one machine; give at least two, such as 64GB,64GB, or use --memory"
        )
    return tuple(found)


def shape_machines(
    name: str, cluster: Cluster, context: int | None, overrides: ConfigOverrides | None = None
) -> dict[str, Any]:
    """Plans for a published size at every bit width.

    Raises:
        ContextLengthError, InvalidRequestError: a context the model cannot hold.
    """
    config, models = (overrides or ConfigOverrides()).apply(BUILT_IN[name], context), {}
    for width in WIDTHS:
        group_size = None if width.spec is None else width.spec.group_size
        models[width.name] = ModelParts(config, bytes_by_part(config, width), group_size)
    return _report(models, cluster, context)


def checkpoint_machines(
    folder: Path,
    report: Mapping[str, Any],
    cluster: Cluster,
    context: int | None,
    overrides: ConfigOverrides | None = None,
) -> dict[str, Any]:
    """The plan for a checkpoint, of whose sizes ``checkpoint_report`` made a ``report``.

    Raises:
        CheckpointError: it cannot be loaded; ContextLengthError, InvalidRequestError: a context it cannot hold.
    """
    if report["problem"]:
        raise CheckpointError(report["problem"])
    config = (overrides or ConfigOverrides()).apply(MixtralConfig.from_folder(folder), context)
    parts = dict.fromkeys(PARTS, 0) | {part["part"]: part["bytes"] for part in report["parts"]}
    return _report({"this model": ModelParts(config, parts, _group_size(config))}, cluster, context)


def _group_size(config: MixtralConfig) -> int | None:
    """The largest quantisation group of the experts."""
    if config.quantization is None:
        return None
    specs = [config.quantization.for_module(matrix.path) for matrix in matrices(config) if matrix.part == "expert"]
    return max((spec.group_size for spec in specs if spec is not None), default=None)


def _report(models: Mapping[str, ModelParts], cluster: Cluster, context: int | None) -> dict[str, Any]:
    """The document that ``info --machines --json`` prints."""
    link, chip = cluster.link, cluster.chip
    return {
        "is_prediction": True,
        "chip": chip.name,
        "bandwidth_gb_s": chip.bandwidth_gb_s,
        "bandwidth_share": BANDWIDTH_SHARE,
        "disk_bytes_per_s": cluster.speeds.disk_bytes_per_s,
        "link": link.name,
        "over": link.over,
        "collective_s": link.collective_s(len(cluster.memories_gib)),
        "source": link.source,
        "machines": [
            {"memory_gib": memory, "usable_bytes": usable}
            for memory, usable in zip(cluster.memories_gib, cluster.usable_bytes, strict=True)
        ],
        "plans": [{"model": name, **_plan(model, cluster, context)} for name, model in models.items()],
    }


def _plan(model: ModelParts, cluster: Cluster, context: int | None) -> dict[str, Any]:
    splits = {split: _split(split, model, cluster, context) for split in SPLITS}
    fitting = [split for split in SPLITS if splits[split]["fits"]]
    return {
        "one_machine": _one_machine(model, cluster, context),
        "splits": splits,
        # Of equally fast ones the first: layers give what one machine gives to the bit.
        "auto": max(fitting, key=lambda split: float(splits[split]["predicted_tok_s"]), default=None),
    }


def _one_machine(model: ModelParts, cluster: Cluster, context: int | None) -> dict[str, Any]:
    """The machine with the most memory alone: everything in memory, or experts read from disk."""
    sizes = sizes_of(model.config, model.trunk_bytes, model.parts["expert"])
    planner, usable = mac_planner(model.config, sizes, cluster.speeds), max(cluster.usable_bytes)
    needed, tok_s, streams = planner.needs(context).resident_bytes, None, False
    try:
        residency = planner.plan(usable, context).residency
    except MemoryBudgetError:
        pass  # not even with experts on disk
    else:
        streams = residency is not None
        whole_s = token_bytes(model).one_machine_s(decoding_rate(cluster.chip.bandwidth_gb_s))
        tok_s = 1 / whole_s if residency is None else residency.tok_s
    return {
        "memory_gib": max(cluster.memories_gib),
        "bytes": needed,
        "fits": needed <= usable,
        "streams": streams,
        "predicted_tok_s": tok_s,
    }


def _split(split: str, model: ModelParts, cluster: Cluster, context: int | None) -> dict[str, Any]:
    try:
        shares = SPLITS[split](model, cluster.usable_bytes)
    except InvalidRequestError as error:
        return {"fits": False, "problem": str(error), "machines": [], "predicted_tok_s": None}
    machines = []
    for held, usable in zip(shares, cluster.usable_bytes, strict=True):
        sizes = sizes_of(held.config, held.trunk_bytes, held.expert_bytes)
        needs = mac_planner(held.config, sizes, cluster.speeds).needs(context)
        machines.append(_machine(held, usable, needs))
    token, rate, sum_s = (
        token_bytes(model),
        decoding_rate(cluster.chip.bandwidth_gb_s),
        cluster.link.collective_s(len(machines)),
    )
    if split == "layers":
        seconds = token.layers_s(rate, sum_s, len(machines))
    else:
        largest = max(held.config.intermediate_size for held in shares) / model.config.intermediate_size
        seconds = token.experts_s(rate, sum_s, model.config.num_hidden_layers, largest)
    fits = all(machine["fits"] for machine in machines)
    return {"fits": fits, "problem": None, "machines": machines, "predicted_tok_s": 1 / seconds if fits else None}


def _machine(held: Held, usable: int, needs: MemoryNeeds) -> dict[str, Any]:
    return {
        "layers": held.config.num_hidden_layers,
        "expert_width": held.config.intermediate_size,
        "weight_bytes": held.trunk_bytes + held.expert_bytes,
        "kv_bytes": needs.kv_bytes,
        "working_bytes": needs.working_bytes(RESIDENT_CHUNK_TOKENS),
        "bytes": needs.resident_bytes,
        "usable_bytes": usable,
        "fits": needs.resident_bytes <= usable,
    }
