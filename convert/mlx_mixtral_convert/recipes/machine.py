"""How large a model this machine has room for."""

from __future__ import annotations

from mlx_mixtral.arguments import check_type
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import InvalidRequestError, MemoryBudgetError
from mlx_mixtral.machine.device import Device
from mlx_mixtral.sizes import format_bytes

__all__ = ["DEFAULT_CONTEXT_TOKENS", "room_for_weights"]

DEFAULT_CONTEXT_TOKENS = 4096
# Activations of one chunk of the prompt and MLX's own buffers, rounded up.
WORKING_BYTES = 500_000_000


def room_for_weights(config: MixtralConfig, device: Device, context: int | None = None) -> int:
    """Bytes for weights: what the system recommends to the GPU, less the KV cache of ``context`` tokens and working memory.

    Raises:
        InvalidRequestError: the device does not report its memory, or ``context`` is beyond the model's.
        MemoryBudgetError: cache and working memory alone do not fit.
    """
    if device.recommended_bytes is None:
        raise InvalidRequestError(
            "--fit mac takes the memory size from the GPU of a Mac, but this is not one; give a size, such as 20GB"
        )
    check_type("context", context, (int, type(None)), "a number of tokens")
    tokens = min(DEFAULT_CONTEXT_TOKENS, config.max_context_tokens) if context is None else context
    if not 1 <= tokens <= config.max_context_tokens:
        raise InvalidRequestError(
            f"context is {tokens}; it must be 1 to {config.max_context_tokens} tokens, the model's own"
        )
    cache = tokens * config.kv_bytes_per_token()
    room = device.recommended_bytes - cache - WORKING_BYTES
    if room <= 0:
        raise MemoryBudgetError(
            f"{format_bytes(device.recommended_bytes)} leave no room for a model after the KV cache of {tokens} tokens, "
            f"{format_bytes(cache)}; use a smaller --context"
        )
    return room
