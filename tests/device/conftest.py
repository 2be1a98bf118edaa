"""The device and type that ``tests/device`` computes with, and how far a type may be from float32.

``make test-device`` sets MLX_MIXTRAL_TEST_DEVICE=default: MLX's own choice. As a part of ``make test`` they run on the CPU like
everything else, so that they cannot rot. MLX_MIXTRAL_TEST_DTYPE puts another type in the place of the device's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import pytest

from mlx_mixtral.machine.device import DTYPE_NAMES, compute_dtype, current_device


@dataclass(frozen=True)
class Allowed:
    """What a type of numbers may change, measured in 16 bits on the CPU backend, which sums more coarsely than GPUs.

    In 16 bits a router now and then takes another expert where two are all but level, and that token's logits are others. So
    half of the tokens have to be within ``kl``, and ``share`` of them within ten times as much. Wrong numbers are nats apart.
    """

    logits: float
    """How far below the largest a greedy token's logit may be, for ``share`` of them."""
    kl: float
    """Divergence of a token's probabilities, in nats."""
    share: float


ALLOWED = {"F32": Allowed(2e-3, 1e-6, 1.0), "F16": Allowed(0.1, 3e-3, 0.75), "BF16": Allowed(1.0, 3e-2, 0.75)}


@dataclass(frozen=True)
class Computing:
    """The device and type the tests of this folder run with."""

    device: str
    dtype: str

    @property
    def name(self) -> str:
        return DTYPE_NAMES[self.dtype]

    @property
    def allowed(self) -> Allowed:
        return ALLOWED[self.dtype]

    @property
    def multiplies_floats(self) -> bool:
        """MLX's CPU backend gathers unquantised experts in float32 only."""
        return self.dtype == "F32" or self.device != "cpu"


@pytest.fixture(scope="module", autouse=True)
def computing() -> Iterator[Computing]:
    before = mx.default_device()
    if os.environ.get("MLX_MIXTRAL_TEST_DEVICE") == "default":
        mx.set_default_device(mx.gpu if mx.is_available(mx.gpu) else mx.cpu)
    device = current_device()
    dtype = compute_dtype(os.environ.get("MLX_MIXTRAL_TEST_DTYPE", "auto"), device)
    print(f"{device.kind} {device.name}, {DTYPE_NAMES[dtype]}")
    yield Computing(device.kind, dtype)
    mx.set_default_device(before)
