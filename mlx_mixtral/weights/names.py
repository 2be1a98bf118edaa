"""What trainers and compilers put around a model, taken off the names of its tensors again.

module.                    torch's DataParallel and DistributedDataParallel, DeepSpeed
base_model.model.          PEFT
_orig_mod.                 torch.compile, of the whole model or of a part
_fsdp_wrapped_module.      torch's FullyShardedDataParallel, in the middle of a name too
"""

from __future__ import annotations

from collections.abc import Mapping

from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.weights.safetensors import TensorInfo

__all__ = ["unwrapped"]

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_PEFT = "base_model.model."


def unwrapped(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors under the model's own names; messages keep those of the file.

    Raises:
        CheckpointError: two tensors would have one name.
    """
    plain: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if (own := _unwrapped(name)) in plain:
            raise CheckpointError(
                f"{info.file}: tensors {plain[own].name!r} and {name!r} are both {own!r} of the model; remove one of them"
            )
        plain[own] = info
    return plain


def _unwrapped(name: str) -> str:
    own = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while own.startswith(_PEFT):
        own = own.removeprefix(_PEFT)
    return own
