"""One ``bench`` of the program: everything checked first, then measured, then shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_mixtral import MixtralConfig, __version__
from mlx_mixtral.bench.backend import Ours
from mlx_mixtral.bench.cases import Cases, plan_cases
from mlx_mixtral.bench.measurements import OURS, BenchReport
from mlx_mixtral.bench.mlx_lm_backend import MlxLm, check_mlx_lm, mlx_lm_version
from mlx_mixtral.bench.plots import draw_bench
from mlx_mixtral.bench.run import Opener, run_bench
from mlx_mixtral.cli.bench.tables import print_bench
from mlx_mixtral.cli.console import err_console
from mlx_mixtral.cli.progress import fetch, load_model
from mlx_mixtral.errors import ContextLengthError, InvalidRequestError
from mlx_mixtral.evaluation.figures import check_plotting
from mlx_mixtral.files import check_destination, replace_file
from mlx_mixtral.info.estimate import BUILT_IN
from mlx_mixtral.info.macs import BANDWIDTH_SOURCE, chips_of, measured_on_such
from mlx_mixtral.machine.device import DTYPE_NAMES, Device, compute_dtype, current_device
from mlx_mixtral.machine.memory import read_system_memory, usable_bytes
from mlx_mixtral.sizes import parse_size
from mlx_mixtral.weights.checkpoint import Checkpoint

__all__ = ["BenchJob", "published"]

MLX_LM, MLX_LM_F32 = "mlx-lm", "mlx-lm float32"
# Of caches and working memory, beside the weights of the sides.
SPARE = 1.15


class BenchJob:
    """What to measure, checked; ``run`` measures, and ``report`` holds what was found so far.

    Raises:
        MixtralError: anything that keeps the run from ending well, before it begins.
    """

    def __init__(
        self,
        model: str,
        *,
        prompts: Sequence[int] | None,
        depths: Sequence[int] | None,
        batches: Sequence[int] | None,
        tokens: int,
        repeats: int,
        compare: str | None,
        plot: str | None,
        revision: str | None,
        context: int | None,
        memory: str | None,
        dtype: str,
        **loading: Any,
    ) -> None:
        self.device, self.report, self._is_complete = current_device(), BenchReport(), False
        wanted: dict[str, Any] = {
            "prompts": prompts, "depths": depths, "batches": batches, "tokens": tokens, "repeats": repeats,
        }  # fmt: skip
        plan_cases(2**62, **wanted)  # what no model can do, before one is downloaded
        self._place = None if plot is None else check_destination("--plot", plot)
        if plot is not None:
            check_plotting()
        if compare is not None:
            mlx_lm_version()
        if memory is not None:
            parse_size(memory)
        self.folder = fetch(model, revision=revision)
        self.name = self.folder.resolve().name if Path(model).exists() else model
        self.config = MixtralConfig.from_folder(self.folder)
        self.cases = self._plan(context, wanted)
        if compare is not None:
            check_mlx_lm(self.folder)
        self.dtype = DTYPE_NAMES[compute_dtype(dtype, self.device)]
        self._loading = loading | {"memory": memory, "dtype": dtype, "context": context or self.cases.context}
        self._openers = self._sides(compare)

    def run(self) -> None:
        """Measure; an interrupt leaves what was found in ``report``."""
        in_turn = len(self._openers) == 1 or self._fit_together()
        vocab_size, console = self.config.vocab_size, err_console()
        if console.is_terminal:
            with console.status("measuring") as status:
                run_bench(self._openers, self.cases, vocab_size, self.report, in_turn=in_turn, note=status.update)
        else:
            run_bench(self._openers, self.cases, vocab_size, self.report, in_turn=in_turn)
        self._is_complete = True

    def to_dict(self) -> dict[str, Any]:
        """The result as ``--json`` prints it."""
        versions = {"mlx-mixtral": __version__, "mlx": version("mlx")}
        if MLX_LM in self._openers:
            versions[MLX_LM] = mlx_lm_version()
        return {
            "model": self.name,
            "device": {"kind": self.device.kind, "name": self.device.name, "memory_bytes": self.device.memory_bytes},
            "compute_dtype": self.dtype,
            "versions": versions,
            "tokens": self.cases.tokens,
            "repeats": self.cases.repeats,
            "complete": self._is_complete,
            **self.report.to_dict(),
            "published": published(self.device, self.config),
        }

    def print(self) -> None:
        """The result as tables on stdout."""
        print_bench(self.to_dict())

    def plot(self) -> None:
        """Write the plot, where one is wanted.

        Raises:
            DestinationError, DiskSpaceError: it cannot be written.
        """
        if self._place is not None:
            replace_file(self._place, draw_bench(f"{self.name} on {self.device.name}, {self.dtype}", self.report))

    def _plan(self, context: int | None, wanted: dict[str, Any]) -> Cases:
        own = self.config.max_position_embeddings
        if context is not None and context < 1:
            raise InvalidRequestError(f"context is {context}; it must be a number of tokens, at least 1")
        if context is not None and context > own:
            raise ContextLengthError(f"context is {context}; the model's own is {own} tokens")
        return plan_cases(own if context is None else context, **wanted)

    def _sides(self, compare: str | None) -> dict[str, Opener]:
        openers: dict[str, Opener] = {OURS: lambda: Ours(load_model(self.folder, **self._loading).model)}
        if compare is not None:
            openers[MLX_LM] = lambda: MlxLm(self.folder)
            if self.device.kind == "cpu":
                openers[MLX_LM_F32] = lambda: MlxLm(self.folder, in_float32=True)
        return openers

    def _fit_together(self) -> bool:
        usable = usable_bytes(self.device, read_system_memory())
        weights = Checkpoint(self.folder).nbytes
        memory = self._loading["memory"]
        ours = weights if memory is None else min(weights, parse_size(memory))
        # In float32 what is not packed takes twice as much, ours and theirs.
        growth = 2 if self.device.kind == "cpu" and self.config.quantization is None else 1
        total = growth * ours + (len(self._openers) - 1) * growth * weights
        return usable is None or SPARE * total <= usable


def published(device: Device, config: MixtralConfig) -> dict[str, Any]:
    """What others published of machines like ``device``: nothing where its kind is not known.

    Speeds are of Mixtral 8x7B and given for models of its shape only.
    """
    chips, ours, theirs = chips_of(device), config, BUILT_IN["8x7b"]
    axes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts", "num_experts_per_tok")
    is_8x7b = all(getattr(ours, axis) == getattr(theirs, axis) for axis in axes)
    return {
        "bandwidths": [asdict(chip) | {"source": BANDWIDTH_SOURCE} for chip in chips],
        "decode_8x7b": [asdict(entry) for entry in measured_on_such(device)] if is_8x7b else [],
    }
