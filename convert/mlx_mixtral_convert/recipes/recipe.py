"""One default packing and exceptions by module path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlx_mixtral.arguments import as_path, checked, is_integer
from mlx_mixtral.config.layout import Matrix, matrices
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.errors import ConfigError
from mlx_mixtral.reading import read_json

__all__ = ["ROUNDINGS", "Override", "Recipe"]

Override = QuantizationSpec | Mapping[str, Any] | None | bool

ROUTER_MIN_BITS = 8
ROUNDINGS = ("plain", "search", "gptq", "tuned")


@checked()
@dataclass(frozen=True)
class Recipe:
    """How a model is packed.

    Example:
        Recipe(bits=3, overrides={"*.self_attn.*": {"bits": 6}, "lm_head": None})

    Args:
        bits: bits per weight; None leaves everything unquantised that no override names.
        group_size: weights that share a scale, along the input; the mode's default (affine: 64) when None.
        mode: ``affine`` (1, 2, 3, 4, 5, 6 or 8 bits, groups of 32, 64 or 128), ``mxfp4``, ``nvfp4`` or ``mxfp8``.
        overrides: module path globs (``*.self_attn.*``, ``lm_head``, ``model.layers.0.*``) to a ``QuantizationSpec``, to a
            mapping of ``bits``, ``group_size`` and ``mode`` (what it leaves out comes from the recipe), or to None or False:
            unquantised. Of several that match, the last wins.
        rounding: how affine matrices find their codes at the same format: ``plain`` (``mx.quantize``), ``search`` (scale and
            bias of least squared error), ``gptq`` (error compensation, within a matrix and for those before it) or ``tuned``
            (``gptq``, and then learned). The last two need a calibration.

    The router stays unquantised unless an override gives it 8 bits; fewer are refused: everything depends on its choices. So
    does a matrix whose rows no group size of the mode divides, as with mlx-lm.

    Raises:
        ConfigError: a combination MLX has no kernel for.
    """

    bits: int | None = 4
    group_size: int | None = None
    mode: str = "affine"
    overrides: Mapping[str, Override] = field(default_factory=dict)
    rounding: str = "plain"

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise ConfigError(f"recipe: rounding {self.rounding!r} is unknown; use {', '.join(ROUNDINGS)}")
        if self.bits is None:
            QuantizationSpec.make(None, self.group_size, self.mode)
        elif self.mode != "affine" and self.bits == Recipe.bits:
            # 4 is what a caller who named only the mode gets: it must not contradict mxfp8.
            object.__setattr__(self, "bits", QuantizationSpec.make(None, self.group_size, self.mode).bits)
        _ = self.default
        if not isinstance(self.overrides, Mapping) or not all(isinstance(pattern, str) for pattern in self.overrides):
            raise ConfigError(
                f"recipe: overrides is {self.overrides!r}; it must map patterns of module paths to packings"
            )
        for pattern in self.overrides:
            self._override(pattern)

    @property
    def default(self) -> QuantizationSpec | None:
        """The packing of matrices that no override matches, None for unquantised."""
        return None if self.bits is None else QuantizationSpec.make(self.bits, self.group_size, self.mode)

    def assign(self, config: MixtralConfig) -> dict[str, QuantizationSpec | None]:
        """The packing of every matrix of a model by module path, None for unquantised.

        Raises:
            ConfigError: a group size that does not divide a matrix's input where another would, an override that matches
                nothing, or a router below 8 bits.
        """
        listed = list(matrices(config))
        for pattern in self.overrides:
            if not any(fnmatchcase(matrix.path, pattern) for matrix in listed):
                raise ConfigError(
                    f"recipe: override {pattern!r} matches no module of this model; paths look like {listed[1].path!r}, "
                    f"{listed[-2].path!r} or {listed[-1].path!r}"
                )
        assigned = {matrix.path: self._assign(matrix) for matrix in listed}
        for matrix in listed:
            if (spec := assigned[matrix.path]) is None:
                continue
            if spec.has_group_for(matrix.in_features):
                spec.check_divides(matrix.in_features, matrix.path)
            else:
                assigned[matrix.path] = None
        return assigned

    def _assign(self, matrix: Matrix) -> QuantizationSpec | None:
        matching = [pattern for pattern in self.overrides if fnmatchcase(matrix.path, pattern)]
        if not matching:
            return None if matrix.part == "router" else self.default
        spec = self._override(matching[-1])
        if matrix.part == "router" and spec is not None and spec.bits < ROUTER_MIN_BITS:
            raise ConfigError(
                f"recipe: override {matching[-1]!r} gives the router {matrix.path} {spec.bits} bits; it needs at least "
                f"{ROUTER_MIN_BITS}: add '*.gate': false after it, or match '*.switch_mlp.*'"
            )
        return spec

    def _override(self, pattern: str) -> QuantizationSpec | None:
        value = self.overrides[pattern]
        if value is None or value is False:
            return None
        if isinstance(value, QuantizationSpec):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"recipe: override {pattern!r} is {value!r}; use an object with bits, group_size and mode, or false"
            )
        if unknown := sorted(set(value) - {"bits", "group_size", "mode"}):
            raise ConfigError(
                f"recipe: override {pattern!r} has {unknown[0]!r}; the known keys are bits, group_size and mode"
            )
        # An override that only names bits means affine ones: the other modes have no choice of bits.
        affine = "bits" in value or "group_size" in value
        mode = value.get("mode", "affine" if affine else self.mode)
        inherited = {"bits": self.bits, "group_size": self.group_size} if mode == self.mode else {}
        try:
            return QuantizationSpec.from_dict({**inherited, **value, "mode": mode}, f"recipe: override {pattern!r}")
        except ConfigError as error:
            prefix = "" if str(error).startswith("recipe") else f"recipe: override {pattern!r}: "
            raise ConfigError(f"{prefix}{error}") from error

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Read what ``to_dict`` writes; keys left out have the defaults of ``Recipe``.

        Raises:
            ConfigError: an unknown key or a value of the wrong kind.
        """
        known = ("bits", "group_size", "mode", "overrides", "rounding")
        if unknown := sorted(set(entries) - set(known)):
            raise ConfigError(f"{where}: {unknown[0]!r} is not known; a recipe has {', '.join(known)}")
        overrides, mode = entries.get("overrides", {}), entries.get("mode", "affine")
        if not isinstance(overrides, Mapping):
            raise ConfigError(f"{where}: overrides is {overrides!r}, not an object of patterns")
        if not isinstance(mode, str):
            raise ConfigError(f"{where}: mode is {mode!r}, not a name")
        for key in ("bits", "group_size"):
            value = entries.get(key)
            if value is not None and not is_integer(value):
                raise ConfigError(f"{where}: {key} is {value!r}, not an integer or null")
        rounding = entries.get("rounding", "plain")
        if not isinstance(rounding, str):
            raise ConfigError(f"{where}: rounding is {rounding!r}, not a name")
        return cls(entries.get("bits", 4), entries.get("group_size"), mode, dict(overrides), rounding)

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Read a recipe from a JSON file.

        Raises:
            CheckpointError: the file cannot be read or is not a JSON object.
            ConfigError: it is not a recipe.
        """
        return cls.from_dict(read_json(as_path("path", path)), str(path))

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that ``from_dict`` reads back."""
        default = self.default
        overrides = {pattern: self._override(pattern) for pattern in self.overrides}
        return {
            "bits": self.bits,
            "group_size": self.group_size if default is None else default.group_size,
            "mode": self.mode,
            "overrides": {pattern: spec.to_dict() if spec else False for pattern, spec in overrides.items()},
        } | ({"rounding": self.rounding} if self.rounding != "plain" else {})

    def __str__(self) -> str:
        base = "unquantised" if self.default is None else str(self.default)
        base += f", {self.rounding} rounding" if self.rounding != "plain" else ""
        return f"{base}, {len(self.overrides)} overrides" if self.overrides else base
