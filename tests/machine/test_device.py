"""Compute types by device, MLX's answers turned into a Device, and the wired limit given back."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.machine.device import Device, compute_dtype, current_device, wired


def _metal(architecture: str, recommended_bytes: int | None = 12 * 10**9) -> Device:
    return Device("metal", "Apple M", architecture, 16 * 2**30, recommended_bytes)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        (Device("cpu", "CPU", "x86_64"), "F32"),
        (Device("cpu", "CPU", "applegpu_g13s"), "F32"),
        (_metal("applegpu_g13g"), "F16"),  # M1
        (_metal("applegpu_g13s"), "F16"),  # M1 Max
        (_metal("applegpu_g14g"), "F16"),  # M2
        (_metal("applegpu_g14d"), "F16"),  # M2 Ultra
        (_metal("applegpu_g15g"), "BF16"),  # M3
        (_metal("applegpu_g16s"), "BF16"),  # M4 Max
        (_metal("applegpu_g17g"), "BF16"),
        (_metal(""), "BF16"),
        (Device("cuda", "NVIDIA H100", "sm_90"), "BF16"),
        (Device("cuda", "NVIDIA", "x_g13s"), "BF16"),
    ],
)
def test_auto_suits_the_device(device: Device, dtype: str) -> None:
    assert compute_dtype("auto", device) == dtype


@pytest.mark.parametrize(("requested", "dtype"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_a_requested_type_wins_on_every_device(requested: str, dtype: str) -> None:
    for device in (Device("cpu", "", ""), _metal("applegpu_g13s"), _metal("applegpu_g16s"), Device("cuda", "", "")):
        assert compute_dtype(requested, device) == dtype


@pytest.mark.parametrize("requested", ["", "fp16", "F16", "int8", "AUTO"])
def test_an_unknown_type_is_refused_with_the_choices(requested: str) -> None:
    with pytest.raises(InvalidRequestError, match="use auto, float32, float16, bfloat16") as caught:
        compute_dtype(requested, Device("cpu", "", ""))
    assert repr(requested) in str(caught.value)


@pytest.mark.parametrize(
    ("device", "generation"),
    [
        (_metal("applegpu_g13s"), 13),
        (_metal("applegpu_g14d"), 14),
        (_metal("applegpu_g15g"), 15),
        (_metal("applegpu_g16s"), 16),
        (_metal("applegpu"), None),
        (_metal(""), None),
        (Device("cpu", "", "applegpu_g13s"), None),
        (Device("cuda", "", "sm_g90"), None),
    ],
)
def test_the_generation_is_read_from_the_architecture_of_metal_devices(device: Device, generation: int | None) -> None:
    assert device.apple_gpu_generation == generation


def test_the_current_device_is_the_one_mlx_computes_on() -> None:
    device = current_device()
    assert device.kind in ("cpu", "metal", "cuda")
    assert (device.kind == "cpu") == (mx.default_device().type == mx.DeviceType.cpu)
    assert device.name


def _pretend(monkeypatch: pytest.MonkeyPatch, *, metal: bool, info: Any) -> None:
    gpu = mx.Device(mx.gpu)

    def answer(device: Any) -> Any:
        assert device == gpu
        if isinstance(info, Exception):
            raise info
        return info

    monkeypatch.setattr(mx, "default_device", lambda: gpu)
    monkeypatch.setattr(mx, "device_info", answer)
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)


def test_a_mac_is_described_from_what_metal_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "device_name": "Apple M2 Pro",
        "architecture": "applegpu_g14s",
        "memory_size": 34359738368,
        "max_recommended_working_set_size": 22906503168,
        "max_buffer_length": 1,
    }
    _pretend(monkeypatch, metal=True, info=told)
    device = current_device()
    assert device == Device("metal", "Apple M2 Pro", "applegpu_g14s", 34359738368, 22906503168)
    assert compute_dtype("auto", device) == "F16"


def test_a_cuda_device_is_described_without_a_recommended_size(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, metal=False, info={"device_name": "NVIDIA H100", "total_memory": 85_000_000_000})
    assert current_device() == Device("cuda", "NVIDIA H100", "", 85_000_000_000, None)


@pytest.mark.parametrize("error", [RuntimeError("no device"), TypeError("no such function")])
def test_a_device_that_tells_nothing_is_still_described(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    _pretend(monkeypatch, metal=True, info=error)
    assert current_device() == Device("metal", "metal", "", None, None)


class _Limit:
    """MLX's wired limit: setting it returns the one before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.value, self.log = 777, list[str]()
        monkeypatch.setattr(mx, "set_wired_limit", self.set)
        monkeypatch.setattr(mx, "synchronize", lambda stream=None: self.log.append("synchronize"))

    def set(self, limit: int) -> int:
        before, self.value = self.value, limit
        self.log.append(f"limit {limit}")
        return before


def test_wired_raises_the_limit_inside_and_restores_it_after_the_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = _Limit(monkeypatch)
    with wired(_metal("applegpu_g15s", 12345)):
        assert limit.value == 12345
    assert limit.log == ["limit 12345", "synchronize", "limit 777"]


def test_wired_restores_the_limit_when_generation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = _Limit(monkeypatch)
    with pytest.raises(KeyboardInterrupt), wired(_metal("applegpu_g15s", 12345)):
        raise KeyboardInterrupt
    assert limit.value == 777


@pytest.mark.parametrize(
    "device", [Device("cpu", "", "", 1, 1), Device("cuda", "", "", 1, 1), _metal("applegpu_g15s", None)]
)
def test_wired_touches_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    limit = _Limit(monkeypatch)
    with wired(device):
        pass
    assert limit.log == []
