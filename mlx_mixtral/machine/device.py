"""What MLX runs on here: the compute type that suits it, its memory, and the wired limit. The only module that asks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_mixtral.errors import InvalidRequestError

__all__ = [
    "DEVICES",
    "DTYPES",
    "DTYPE_NAMES",
    "Device",
    "compute_dtype",
    "current_device",
    "set_default_device",
    "wired",
]

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
DEVICES = ("gpu", "cpu")
DTYPE_NAMES = {short: name for name, short in DTYPES.items()}


@dataclass(frozen=True)
class Device:
    """A device of MLX. Bytes are None where MLX does not say (CPU backend)."""

    kind: str
    """``metal``, ``cuda`` or ``cpu``."""
    name: str
    architecture: str
    memory_bytes: int | None = None
    recommended_bytes: int | None = None
    """Largest working set the operating system advises for the GPU (``max_recommended_working_set_size``)."""

    @property
    def mlx(self) -> mx.Device:
        """What MLX calls it."""
        return mx.Device(mx.cpu if self.kind == "cpu" else mx.gpu)

    @property
    def apple_gpu_generation(self) -> int | None:
        """13 for M1, 14 for M2, 15 for M3 …, None on other devices; from names such as ``applegpu_g13s``."""
        digits = "".join(c for c in self.architecture.rpartition("_g")[2] if c.isdigit())
        return int(digits) if self.kind == "metal" and digits else None


def current_device(name: str | None = None) -> Device:
    """Describe MLX's default device, or the one of a name: ``gpu`` or ``cpu``.

    Raises:
        InvalidRequestError: another name, or no GPU here.
    """
    device = mx.default_device() if name is None else _named(name)
    info = _info(device)
    if device.type == mx.DeviceType.cpu:
        return Device("cpu", str(info.get("device_name", "CPU")), str(info.get("architecture", "")))
    kind = "metal" if mx.metal.is_available() else "cuda"
    return Device(
        kind,
        str(info.get("device_name", kind)),
        str(info.get("architecture", "")),
        _optional(info.get("memory_size", info.get("total_memory"))),
        _optional(info.get("max_recommended_working_set_size")),
    )


def set_default_device(name: str) -> None:
    """Make ``gpu`` or ``cpu`` MLX's default device, for the whole process: for programs, not for libraries.

    Raises:
        InvalidRequestError: another name, or no GPU here.
    """
    mx.set_default_device(_named(name))


def compute_dtype(requested: str, device: Device) -> str:
    """The safetensors name of the type to compute in.

    ``auto`` is float32 on the CPU backend (its 16-bit products run 7 to 27 times slower), float16 on Apple GPUs before M3,
    which have no native bfloat16, and bfloat16 otherwise.

    Raises:
        InvalidRequestError: not ``auto``, ``float32``, ``float16`` or ``bfloat16``.
    """
    if requested in DTYPES:
        return DTYPES[requested]
    if requested != "auto":
        raise InvalidRequestError(f"dtype {requested!r} is unknown; use auto, {', '.join(DTYPES)}")
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


def _named(name: str) -> mx.Device:
    if name not in DEVICES:
        raise InvalidRequestError(f"device {name!r} is unknown; use {' or '.join(DEVICES)}")
    if name == "gpu" and not mx.is_available(mx.gpu):
        raise InvalidRequestError("device 'gpu' is not available: MLX finds no GPU on this machine; use cpu")
    return mx.Device(mx.gpu if name == "gpu" else mx.cpu)


def _info(device: Any) -> dict[str, Any]:
    try:
        return dict(mx.device_info(device))
    except (RuntimeError, TypeError):
        return {}


def _optional(value: Any) -> int | None:
    return int(value) if value else None
