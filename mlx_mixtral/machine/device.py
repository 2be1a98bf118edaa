"""What MLX runs on here: the compute type that suits it, its memory, and the wired limit. The only module that asks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_mixtral.errors import InvalidRequestError

__all__ = ["DTYPE_NAMES", "Device", "compute_dtype", "current_device", "wired"]

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
DTYPE_NAMES = {short: name for name, short in _DTYPES.items()}


@dataclass(frozen=True)
class Device:
    """The default MLX device. Bytes are None where MLX does not tell (CPU backend)."""

    kind: str
    """``metal``, ``cuda`` or ``cpu``."""
    name: str
    architecture: str
    memory_bytes: int | None = None
    recommended_bytes: int | None = None
    """Largest working set the operating system advises for the GPU (``max_recommended_working_set_size``)."""

    @property
    def apple_gpu_generation(self) -> int | None:
        """13 for M1, 14 for M2, 15 for M3 …, None on other devices; from names such as ``applegpu_g13s``."""
        digits = "".join(c for c in self.architecture.rpartition("_g")[2] if c.isdigit())
        return int(digits) if self.kind == "metal" and digits else None


def current_device() -> Device:
    """Describe MLX's default device."""
    if mx.default_device().type == mx.DeviceType.cpu:
        info = _info(mx.Device(mx.cpu))
        return Device("cpu", str(info.get("device_name", "CPU")), str(info.get("architecture", "")))
    info = _info(mx.default_device())
    kind = "metal" if mx.metal.is_available() else "cuda"
    return Device(
        kind,
        str(info.get("device_name", kind)),
        str(info.get("architecture", "")),
        _optional(info.get("memory_size", info.get("total_memory"))),
        _optional(info.get("max_recommended_working_set_size")),
    )


def compute_dtype(requested: str, device: Device) -> str:
    """The safetensors name of the type to compute in.

    ``auto`` is float32 on the CPU backend (its 16-bit products run 7 to 27 times slower), float16 on Apple GPUs before M3,
    which have no native bfloat16, and bfloat16 otherwise.

    Raises:
        InvalidRequestError: not ``auto``, ``float32``, ``float16`` or ``bfloat16``.
    """
    if requested in _DTYPES:
        return _DTYPES[requested]
    if requested != "auto":
        raise InvalidRequestError(f"dtype {requested!r} is unknown; use auto, {', '.join(_DTYPES)}")
    if device.kind == "cpu":
        return "F32"
    generation = device.apple_gpu_generation
    return "F16" if generation is not None and generation < 15 else "BF16"


@contextlib.contextmanager
def wired(device: Device, stream: mx.Stream | None = None, budget_bytes: int | None = None) -> Iterator[None]:
    """Keep the weights wired while generating, as far as the system recommends; the old limit is restored.

    With a budget no more than that is wired: what streams experts leaves the rest to the system.

    Without it macOS may page weights out between tokens. Never beyond the recommended working set: raising the system's own
    limit (``sysctl iogpu.wired_limit_mb``) has cost users kernel panics and is not ours to do. Needs macOS 15; a no-op
    elsewhere. The limit must not change under work in flight, so ``stream`` is waited for before it is restored.
    """
    if device.kind != "metal" or device.recommended_bytes is None:
        yield
        return
    before = mx.set_wired_limit(min(device.recommended_bytes, budget_bytes or device.recommended_bytes))
    try:
        yield
    finally:
        mx.synchronize(stream)
        mx.set_wired_limit(before)


def _info(device: Any) -> dict[str, Any]:
    try:
        return dict(mx.device_info(device))
    except (RuntimeError, TypeError):
        return {}


def _optional(value: Any) -> int | None:
    return int(value) if value else None
