"""Quantised formats of MLX: which bits, groups and modes exist, and what a matrix in them weighs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from mlx_mixtral.arguments import is_integer, shown
from mlx_mixtral.errors import ConfigError

__all__ = ["AFFINE_BITS", "AFFINE_GROUP_SIZES", "MODES", "QuantizationConfig", "QuantizationSpec", "mlx_entry"]

Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]

AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)
AFFINE_GROUP_SIZES = (32, 64, 128)
# Modes other than affine allow exactly one (bits, group_size) each.
# https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html
_FIXED: dict[str, tuple[int, int]] = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
MODES: tuple[str, ...] = ("affine", *_FIXED)


@dataclass(frozen=True)
class QuantizationSpec:
    """How one matrix is packed: ``bits`` a weight, groups of ``group_size`` along the input axis, and the mode.

    ``affine`` stores a scale and a bias a group in the activation dtype; ``mxfp4``, ``mxfp8`` and ``nvfp4`` store one
    byte of scale a group and no bias.

    Raises:
        ConfigError: a combination MLX has no kernel for.
    """

    bits: int
    group_size: int
    mode: Mode = "affine"

    def __post_init__(self) -> None:
        for name in ("bits", "group_size"):
            if type(value := getattr(self, name)) is not int:
                raise ConfigError(f"quantization {name} is {shown(value)}, not an integer")
        if self.mode not in MODES:
            raise ConfigError(f"quantization mode {self.mode!r} is unknown; use one of {', '.join(MODES)}")
        if self.mode == "affine":
            if self.bits not in AFFINE_BITS:
                raise ConfigError(f"{shown(self.bits)} bits are not supported in affine mode; use {_or(AFFINE_BITS)}")
            if self.group_size not in AFFINE_GROUP_SIZES:
                raise ConfigError(
                    f"group size {self.group_size} is not supported in affine mode; use {_or(AFFINE_GROUP_SIZES)}"
                )
        elif (self.bits, self.group_size) != _FIXED[self.mode]:
            bits, group_size = _FIXED[self.mode]
            raise ConfigError(
                f"{self.mode} means {bits} bits in groups of {group_size}, not {self.bits} bits in groups of "
                f"{self.group_size}; leave both out"
            )

    @classmethod
    def make(cls, bits: int | None = None, group_size: int | None = None, mode: str = "affine") -> QuantizationSpec:
        """A spec with the mode's own defaults where ``bits`` or ``group_size`` is None (affine: 4 bits, groups of 64)."""
        if mode not in MODES:
            raise ConfigError(f"quantization mode {mode!r} is unknown; use one of {', '.join(MODES)}")
        default_bits, default_group = _FIXED.get(mode, (4, 64))
        return cls(
            default_bits if bits is None else bits,
            default_group if group_size is None else group_size,
            cast("Mode", mode),
        )

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any], where: str) -> QuantizationSpec:
        """Read one ``{"bits", "group_size", "mode"}`` entry of a config; ``where`` names it in errors."""
        bits, group_size, mode = entry.get("bits"), entry.get("group_size"), entry.get("mode", "affine")
        if not isinstance(mode, str):
            raise ConfigError(f"{where}: mode is {mode!r}, not a name; use one of {', '.join(MODES)}")
        for key, value in (("bits", bits), ("group_size", group_size)):
            if value is not None and not is_integer(value):
                raise ConfigError(f"{where}: {key} is {shown(value)}, not an integer")
        return cls.make(bits, group_size, mode)

    def to_dict(self) -> dict[str, Any]:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    @property
    def has_biases(self) -> bool:
        return self.mode == "affine"

    def packed_columns(self, in_features: int) -> int:
        """Number of uint32 words in a packed row of ``in_features`` weights."""
        return in_features * self.bits // 32

    def groups(self, in_features: int) -> int:
        """Number of scales in a row of ``in_features`` weights."""
        return in_features // self.group_size

    def nbytes(self, rows: int, in_features: int, scale_bytes: int = 2) -> int:
        """Bytes of ``rows`` packed rows: words, scales and biases (``scale_bytes`` each where the mode has biases)."""
        per_group = 2 * scale_bytes if self.has_biases else 1
        return rows * (4 * self.packed_columns(in_features) + per_group * self.groups(in_features))

    def has_group_for(self, in_features: int) -> bool:
        """Whether rows of ``in_features`` weights divide into groups of some size that the mode has."""
        sizes = AFFINE_GROUP_SIZES if self.mode == "affine" else (self.group_size,)
        return any(in_features % size == 0 for size in sizes)

    def check_divides(self, in_features: int, path: str) -> None:
        """Raise ConfigError unless rows of ``in_features`` weights divide into groups and whole words."""
        if in_features % self.group_size:
            fitting = [g for g in AFFINE_GROUP_SIZES if in_features % g == 0]
            fix = f"use a group size of {_or(fitting)}" if fitting and self.mode == "affine" else "leave it unquantised"
            raise ConfigError(f"{path}: rows of {in_features} do not divide into groups of {self.group_size}; {fix}")

    def __str__(self) -> str:
        return f"{self.bits}-bit g{self.group_size}" if self.mode == "affine" else self.mode


def mlx_entry(entries: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What ``config.json`` says of MLX's packing: ``quantization``, or ``quantization_config`` alone where that is MLX's.

    The hub's pages read the second key, and other libraries write it: theirs name a method or have settings of their own.
    """
    if isinstance(entry := entries.get("quantization"), Mapping):
        return entry
    entry = entries.get("quantization_config")
    if not isinstance(entry, Mapping) or not {"bits", "group_size"} <= set(entry):
        return None
    own = {"bits", "group_size", "mode"} | ({"quant_method"} if entry.get("quant_method") == "mlx" else set())
    others = (key for key, value in entry.items() if key not in own and not isinstance(value, Mapping))
    return entry if all("." in key or key == "lm_head" for key in others) else None


@dataclass(frozen=True)
class QuantizationConfig:
    """The ``quantization`` entry of an MLX checkpoint's config.json: a default and overrides by module path.

    An override is a spec, or None for a module left unquantised (written ``false`` on disk).
    """

    default: QuantizationSpec
    overrides: Mapping[str, QuantizationSpec | None] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> QuantizationConfig:
        overrides: dict[str, QuantizationSpec | None] = {}
        for key, value in entry.items():
            if isinstance(value, Mapping):
                overrides[key] = QuantizationSpec.from_dict(value, f"quantization of {key}")
            elif value is False:
                overrides[key] = None
        return cls(QuantizationSpec.from_dict(entry, "quantization"), overrides)

    def to_dict(self) -> dict[str, Any]:
        entry: dict[str, Any] = self.default.to_dict()
        for path, spec in self.overrides.items():
            entry[path] = False if spec is None else spec.to_dict()
        return entry

    def for_module(self, path: str) -> QuantizationSpec | None:
        """The spec for a module path, None when it is named as unquantised."""
        return self.overrides.get(path, self.default)


def _or(values: tuple[int, ...] | list[int]) -> str:
    *head, last = [str(v) for v in values]
    return f"{', '.join(head)} or {last}" if head else last
