"""Bits for every group of matrices so that a model fits a size and loses least.

A multiple-choice knapsack: each group of ``group_of`` takes one packing, sizes and predicted losses add up. Solved by dynamic
programming over the bytes in fine steps. q, k and v stay alike and gate and up too, for the runtime fuses them; routers are
never packed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Matrix, matrices, norms
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.errors import MemoryBudgetError
from mlx_mixtral.sizes import format_bytes, format_bytes_up
from mlx_mixtral_convert.calibration.file import Calibration, Losses
from mlx_mixtral_convert.calibration.sensitivity import candidates_for, group_of
from mlx_mixtral_convert.calibration.uniform import correction
from mlx_mixtral_convert.recipes.defaults import default_losses
from mlx_mixtral_convert.recipes.recipe import Recipe

__all__ = ["Expected", "Fitted", "expected_loss", "fit", "predicted_kl"]

# With 130 groups, rounding sizes up to a step wastes 0.1% of the room at most, most of which is given out afterwards.
STEPS = 2**17


@dataclass(frozen=True)
class Fitted:
    """A recipe, the bytes of its tensors, and the KL predicted for it in nats per token."""

    recipe: Recipe
    data_bytes: int
    loss: float


def predicted_kl(
    config: MixtralConfig, specs: Mapping[str, QuantizationSpec | None], losses: Losses | None = None
) -> float | None:
    """The sum of ``losses`` for an assignment by path; None for packings or groups they do not know."""
    losses = losses or default_losses(config)
    total, seen = 0.0, set()
    for matrix in matrices(config):
        name, spec = group_of(matrix), specs[matrix.path]
        if name is None or spec is None or (name, spec) in seen:
            continue
        if str(spec) not in losses.get(name, {}):
            return None
        total += losses[name][str(spec)]
        seen.add((name, spec))
    return total


@dataclass(frozen=True)
class Expected:
    """KL to the source in nats per token that is to be expected, and its standard error; None where nothing was measured."""

    kl: float
    error: float | None


def expected_loss(
    config: MixtralConfig,
    specs: Mapping[str, QuantizationSpec | None],
    calibration: Calibration | None,
    rounding: str = "plain",
) -> Expected | None:
    """What a conversion should lose on text like the calibration's; None for packings or groups nothing is known of.

    The sum of the groups' losses, corrected by what models packed alike throughout were measured to lose; of the built-in
    losses when there is no calibration with sensitivities.
    """
    if calibration is None or not calibration.losses:
        guess = predicted_kl(config, specs)
        return None if guess is None else Expected(guess, None)
    if (predicted := predicted_kl(config, specs, calibration.losses)) is None:
        return None
    if (found := correction(calibration.anchors, rounding, predicted)) is None:
        return Expected(predicted, None)
    factor, error = found
    return Expected(predicted * factor, predicted * factor * error)


@dataclass(frozen=True)
class _Choice:
    spec: QuantizationSpec | None
    nbytes: int
    loss: float


def fit(
    config: MixtralConfig,
    budget_bytes: int,
    losses: Losses | None = None,
    *,
    scale_bytes: int = 2,
    overhead_bytes: int = 0,
    rounding: str = "plain",
    least_bits: int = 1,
) -> Fitted:
    """The assignment of least predicted loss that takes at most ``budget_bytes``.

    Args:
        losses: of a calibration; built-in ones for Mixtral when None.
        scale_bytes: bytes of one number of the conversion's float type.
        overhead_bytes: of the budget, what is not tensors.
        rounding: of the recipe made.
        least_bits: of any matrix that is packed.

    Raises:
        MemoryBudgetError: not even the fewest bits fit; the smallest size is named.
    """
    measured = bool(losses)
    losses = losses or default_losses(config)
    groups: dict[str, list[Matrix]] = {}
    fixed = sum(norm.size for norm in norms(config)) * scale_bytes
    for matrix in matrices(config):
        name = group_of(matrix)
        if name is None:
            fixed += matrix.parameters * scale_bytes
        else:
            groups.setdefault(name, []).append(matrix)
    choices = {name: _choices(group, losses.get(name, {}), scale_bytes, least_bits) for name, group in groups.items()}
    least = overhead_bytes + fixed + sum(found[0].nbytes for found in choices.values())
    if not measured:
        # Which matrices lose least by one bit, built-in losses do not know: they have it only where two do not fit.
        larger = {name: _of_two_bits(found) for name, found in choices.items()}
        needed = overhead_bytes + fixed + sum(found[0].nbytes for found in larger.values())
        least, choices = (needed, larger) if needed <= budget_bytes else (least, choices)
    if (room := budget_bytes - least) < 0:
        weights = sum(matrix.parameters for matrix in matrices(config))
        advice = (
            f"; with --fit {format_bytes_up(least).replace(' ', '')} experts are streamed" if least_bits > 1 else ""
        )
        raise MemoryBudgetError(
            f"{format_bytes(budget_bytes)} is too small for this model: the smallest it can be is "
            f"{format_bytes_up(least)}, at {8 * least / weights:.2f} bits per weight{advice}"
        )
    taken = _best(choices, room)
    picked = {name: choices[name][index] for name, index in taken.items()}
    overrides = {matrix.path: picked[name].spec for name, group in groups.items() for matrix in group}
    default = _most_common(groups, picked)
    return Fitted(
        Recipe(
            default.bits if default else None,
            default.group_size if default else None,
            overrides={path: spec for path, spec in overrides.items() if spec != default},
            rounding=rounding,
        ),
        fixed + sum(choice.nbytes for choice in picked.values()),
        sum(choice.loss for choice in picked.values()),
    )


def _choices(group: list[Matrix], losses: Mapping[str, float], scale_bytes: int, least_bits: int) -> list[_Choice]:
    """Ascending in size and descending in loss, those that another beats in both left out."""
    found = [_Choice(None, sum(m.parameters for m in group) * scale_bytes, 0.0)]
    for spec in candidates_for(group[0].in_features):
        nbytes = sum(spec.nbytes(m.parameters // m.in_features, m.in_features, scale_bytes) for m in group)
        if str(spec) in losses and spec.bits >= least_bits:
            found.append(_Choice(spec, nbytes, losses[str(spec)]))
    found.sort(key=lambda choice: (choice.nbytes, choice.loss))
    kept: list[_Choice] = []
    for choice in found:
        if not kept or choice.loss < kept[-1].loss:
            kept.append(choice)
    return kept


def _of_two_bits(choices: list[_Choice]) -> list[_Choice]:
    """Those of two bits or more."""
    return [choice for choice in choices if choice.spec is None or choice.spec.bits > 1]


def _best(choices: Mapping[str, list[_Choice]], room: int) -> dict[str, int]:
    """Dynamic programming over the room in ``STEPS`` equal steps, sizes rounded up; then what is left over is given out."""
    # Sizes differ by multiples of this: in steps of it, as for a small model, the result is exact.
    unit = gcd(*(choice.nbytes - found[0].nbytes for found in choices.values() for choice in found)) or 1
    step = unit * max(1, -(-room // (unit * STEPS)))
    count = room // step + 1
    least = np.zeros(count)  # least loss of the groups so far, by steps used at most
    picks: list[npt.NDArray[np.uint8]] = []
    for found in choices.values():
        rows = np.full((len(found), count), np.inf)
        for index, choice in enumerate(found):
            used = -(-(choice.nbytes - found[0].nbytes) // step)
            if used < count:
                rows[index, used:] = least[: count - used] + choice.loss
        picks.append(rows.argmin(axis=0).astype(np.uint8))
        least = rows.min(axis=0)
    taken: dict[str, int] = {}
    at = count - 1
    for (name, found), pick in zip(reversed(list(choices.items())), reversed(picks), strict=True):
        taken[name] = int(pick[at])
        room -= (more := found[taken[name]].nbytes - found[0].nbytes)
        at -= -(-more // step)
    return _filled(choices, {name: taken[name] for name in choices}, room)


def _filled(choices: Mapping[str, list[_Choice]], taken: dict[str, int], room: int) -> dict[str, int]:
    while True:
        moves = [
            (choice.loss - found[taken[name]].loss, name, index, choice.nbytes - found[taken[name]].nbytes)
            for name, found in choices.items()
            for index, choice in enumerate(found)
            if index > taken[name] and choice.nbytes - found[taken[name]].nbytes <= room
        ]
        if not moves:
            return taken
        _, name, taken[name], more = min(moves)
        room -= more


def _most_common(groups: Mapping[str, list[Matrix]], picked: Mapping[str, _Choice]) -> QuantizationSpec | None:
    weights: Counter[QuantizationSpec] = Counter()
    for name, group in groups.items():
        if (spec := picked[name].spec) is not None:
            weights[spec] += sum(matrix.parameters for matrix in group)
    return weights.most_common(1)[0][0] if weights else None
