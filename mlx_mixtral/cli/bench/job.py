"""One ``bench`` of the program: everything checked first, then measured, then shown."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import Any

from mlx_mixtral import __version__
from mlx_mixtral.arguments import check_integer
from mlx_mixtral.bench.backend import Ours
from mlx_mixtral.bench.cases import Cases, plan_cases
from mlx_mixtral.bench.measurements import OURS, BenchReport
from mlx_mixtral.bench.mlx_lm_backend import MlxLm, check_mlx_lm, mlx_lm_version
from mlx_mixtral.bench.plots import draw_bench
from mlx_mixtral.bench.run import Opener, run_bench
from mlx_mixtral.cli.bench.options import BenchOptions
from mlx_mixtral.cli.bench.tables import print_bench
from mlx_mixtral.cli.console import err_console
from mlx_mixtral.cli.destinations import PLOT, check_destinations
from mlx_mixtral.cli.subject import Subject
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.evaluation.figures import check_plotting
from mlx_mixtral.files import replace_file
from mlx_mixtral.info.macs import published_for
from mlx_mixtral.layers.cpu import products_for
from mlx_mixtral.machine.device import DTYPE_NAMES, compute_dtype, current_device
from mlx_mixtral.machine.memory import read_system_memory, usable_bytes
from mlx_mixtral.sizes import parse_size
from mlx_mixtral.weights.checkpoint import Checkpoint

__all__ = ["BenchJob"]

MLX_LM, MLX_LM_F32 = "mlx-lm", "mlx-lm float32"
# Of caches and working memory, beside the weights of the sides.
SPARE = 1.15


class BenchJob:
    """What to measure, checked; ``run`` measures, and ``report`` holds what was found so far.

    Raises:
        MixtralError: anything that keeps the run from ending well, before it begins.
    """

    def __init__(self, given: BenchOptions) -> None:
        self.device, self.report, self._is_complete = current_device(), BenchReport(), False
        loading = given.loading
        wanted: dict[str, Any] = {
            name: getattr(given, name) for name in ("prompts", "depths", "batches", "tokens", "repeats")
        }
        plan_cases(2**62, **wanted)  # what no model can do, before one is downloaded
        self._place = check_destinations({"--plot": given.plot}, {"--plot": PLOT}, overwrite=given.overwrite).get(
            "--plot"
        )
        if given.plot is not None:
            check_plotting()
        if given.compare is not None:
            mlx_lm_version()
        if loading.memory is not None:
            parse_size(loading.memory)
        self.subject = Subject(given.model, loading)
        self.cases = self._plan(loading.context, wanted)
        if given.compare is not None:
            if loading.overrides.rope_scaling is not None or loading.overrides.rope_theta is not None:
                raise InvalidRequestError(
                    "mlx-lm cannot compute with --rope-scaling and --rope-theta; leave them out of a comparison"
                )
            self._check_adapter()
            check_mlx_lm(self.subject.folder, self._settings, self.subject.adapter_folder)
        self.dtype = DTYPE_NAMES[compute_dtype(loading.dtype, self.device)]
        self._loading = replace(loading, context=loading.context or self.cases.context)
        self._openers = self._sides(given.compare)

    def run(self) -> None:
        """Measure; an interrupt leaves what was found in ``report``."""
        in_turn = len(self._openers) == 1 or self._fit_together()
        vocab_size, console = self.subject.config.vocab_size, err_console()
        with console.status("measuring") as status:
            run_bench(self._openers, self.cases, vocab_size, self.report, in_turn=in_turn, note=status.update)
        self._is_complete = True

    def to_dict(self) -> dict[str, Any]:
        """The result as ``--json`` prints it."""
        versions = {"mlx-mixtral": __version__, "mlx": version("mlx")}
        if MLX_LM in self._openers:
            versions[MLX_LM] = mlx_lm_version()
        return {
            **self.subject.facts(),
            "device": {"kind": self.device.kind, "name": self.device.name, "memory_bytes": self.device.memory_bytes},
            "compute_dtype": self.dtype,
            "products": products_for(self.device).description,
            "versions": versions,
            "tokens": self.cases.tokens,
            "repeats": self.cases.repeats,
            "complete": self._is_complete,
            **self.report.to_dict(),
            "published": published_for(self.device, self.subject.config),
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
            title = f"{self.subject.title} on {self.device.name}, {self.dtype}"
            replace_file(self._place, draw_bench(title, self.report))

    def _check_adapter(self) -> None:
        """That mlx-lm can have the adapter, if there is one."""
        if (adapter := self.subject.adapter) is not None and (adapter.kind != "mlx-lm" or adapter.scale != 1):
            what = "of PEFT" if adapter.kind != "mlx-lm" else f"at another scale than its own (here {adapter.scale:g})"
            raise InvalidRequestError(f"mlx-lm loads no adapters {what}; leave out --compare or --adapter")

    @property
    def _settings(self) -> dict[str, Any]:
        """What mlx-lm computes with in place of the file's."""
        chosen = self.subject.config.num_experts_per_tok
        return {} if self.subject.config.is_dense else {"num_experts_per_tok": chosen}

    def _plan(self, context: int | None, wanted: dict[str, Any]) -> Cases:
        own = self.subject.config.max_context_tokens
        if context is not None:
            check_integer("context", context, 1, wanted="a number of tokens, at least 1")
            self.subject.config.check_context(context)
        return plan_cases(own if context is None else context, **wanted)

    def _sides(self, compare: str | None) -> dict[str, Opener]:
        openers: dict[str, Opener] = {OURS: lambda: Ours(self.subject.load(self._loading))}
        if compare is not None:
            folder, adapter = self.subject.folder, self.subject.adapter_folder
            openers[MLX_LM] = lambda: MlxLm(folder, self._settings, adapter)
            if self.device.kind == "cpu":
                openers[MLX_LM_F32] = lambda: MlxLm(folder, self._settings, adapter, in_float32=True)
        return openers

    def _fit_together(self) -> bool:
        usable = usable_bytes(self.device, read_system_memory())
        weights = Checkpoint(self.subject.folder).nbytes
        memory = self._loading.memory
        ours = weights if memory is None else min(weights, parse_size(memory))
        # In float32 what is not packed takes twice as much, ours and theirs.
        growth = 2 if self.device.kind == "cpu" and self.subject.config.quantization is None else 1
        total = growth * ours + (len(self._openers) - 1) * growth * weights
        return usable is None or SPARE * total <= usable
