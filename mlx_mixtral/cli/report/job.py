"""One ``report`` of the program: everything checked first, then the reference model, then the model, then the folder."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from mlx_mixtral import Mixtral, __version__
from mlx_mixtral.cli.console import note, one_line, out_console, plural
from mlx_mixtral.cli.progress import count_progress
from mlx_mixtral.cli.report.options import ReportOptions
from mlx_mixtral.cli.routing.job import published_beside
from mlx_mixtral.cli.subject import Baseline, Subject, predicted, read_corpus
from mlx_mixtral.errors import CheckpointError, InvalidRequestError, MissingDependencyError
from mlx_mixtral.evaluation.figures import check_plotting
from mlx_mixtral.evaluation.passkey import DEFAULT_DEPTHS, PasskeyResult, check_passkey, passkey
from mlx_mixtral.evaluation.perplexity import evaluate
from mlx_mixtral.evaluation.reference import DEFAULT_TOP_K, Reference, ReferenceHeader
from mlx_mixtral.evaluation.report import SECTION_FILE, Contents, Run, report_files
from mlx_mixtral.evaluation.report.contents import fills_window
from mlx_mixtral.evaluation.results import Evaluation
from mlx_mixtral.evaluation.routing.analysis import RoutingAnalysis, analyse
from mlx_mixtral.evaluation.routing.recording import record_texts
from mlx_mixtral.files import check_folder, write_folder
from mlx_mixtral.info.checkpoint import checkpoint_report
from mlx_mixtral.info.estimate import PART_NAMES
from mlx_mixtral.info.shape import FITS_NOTE
from mlx_mixtral.leftovers import scratch_folder
from mlx_mixtral.machine.device import DTYPE_NAMES, compute_dtype
from mlx_mixtral.sizes import format_bytes

__all__ = ["ReportJob"]

MAX_BYTES, QUICK_BYTES = 32768, 4096
LENGTHS, QUICK_LENGTHS = (512, 1024, 2048, 4096), (512, 1024)
QUICK_DEPTHS = (0.0, 0.5, 1.0)


class ReportJob:
    """Everything that can be refused is refused here, before weights are read; ``run`` measures and writes."""

    def __init__(self, given: ReportOptions, command: str) -> None:
        self.given, self.command, self.left_out = given, command, dict[str, str]()
        if not given.no_plots:
            _check_plotting()
        self.subject = Subject(given.model, given.loading)
        used = "" if self.subject.adapter is None else f"-{self.subject.adapter.name}"
        place = f"{self.subject.name.rpartition('/')[2]}{used}-report" if given.output is None else given.output
        self.folder = check_folder("--output", place, overwrite=given.overwrite, holds=(SECTION_FILE, "plots"))
        usual_bytes = QUICK_BYTES if given.quick else MAX_BYTES
        self.max_bytes = usual_bytes if given.max_bytes is None else given.max_bytes
        texts = read_corpus(given.texts or _bundled(), given.records, self.max_bytes)
        self.facts = self._facts()
        self.corpus = self.subject.encode(texts)
        self.baseline = Baseline(given.reference, given.loading)
        self.window, self.stride = self.baseline.windows(self.subject, self.corpus, given.window)
        if self.baseline.other is not None:
            self._header(self.baseline.other).check_size()
        usual_depths = QUICK_DEPTHS if given.quick else DEFAULT_DEPTHS
        self.depths = usual_depths if given.depths is None else given.depths
        self.lengths = self._lengths(given.lengths, QUICK_LENGTHS if given.quick else LENGTHS)
        # A memory budget reserves KV cache for no more than the longest sequence there will be.
        context = max(self.window, *self.lengths, 1) if given.loading.context is None else given.loading.context
        self.loading = replace(given.loading, context=context)

    def _facts(self) -> Mapping[str, Any]:
        """What ``info`` has of the checkpoint."""
        facts = checkpoint_report(self.subject.folder, (), overrides=self.given.loading.overrides.checked)
        if facts["problem"]:
            raise CheckpointError(f"{self.subject.name} does not load: {facts['problem']}")
        return facts | {"parts": [part | {"part": PART_NAMES[part["part"]]} for part in facts["parts"]]}

    def _lengths(self, lengths: tuple[int, ...] | None, usual: tuple[int, ...]) -> tuple[int, ...]:
        """Of passkey prompts; none, with the reason noted, where the context has no room for one."""
        limit, tokenizer = self.subject.config.max_context_tokens, self.subject.tokenizer
        found = lengths
        if found is None:
            found = tuple(length for length in usual if length <= limit) or (limit,)
            try:
                check_passkey(tokenizer, found[:1], (0.5,), 1, 0, limit)
            except InvalidRequestError as error:
                self.left_out["passkeys"] = f"Passkey retrieval is left out: {error}."
                found = ()
        if found or lengths is not None:
            check_passkey(tokenizer, found, self.depths, self.given.trials, self.given.seed, limit)
        return found

    def _header(self, other: Subject) -> ReferenceHeader:
        top_k = min(DEFAULT_TOP_K, self.subject.config.vocab_size)
        return other.header(self.corpus, self.window, self.stride, top_k)

    def run(self) -> dict[str, Any]:
        """The result as JSON has it; the folder is written."""
        with scratch_folder("report") as scratch:
            reference = self.baseline.file
            if (other := self.baseline.other) is not None:
                place = scratch / "reference"
                reference = other.make_reference(place, self._header(other), self.corpus, self.loading)
            with self.subject.load(self.loading) as model:
                evaluation, passkeys, routing = self._measure(model, reference)
        if not fills_window(evaluation):
            self.left_out["by length"] = (
                "Perplexity by length of context is left out because the texts are too short to fill the longest context."
            )
        self.contents = Contents(
            self.subject.title,
            self.facts,
            evaluation,
            self._run(model),
            None if reference is None else reference.header.model,
            passkeys,
            routing,
            self.left_out,
            FITS_NOTE,
            None if self.subject.adapter is None else self.subject.adapter.to_dict(),
        )
        self.files = report_files(self.contents, with_plots=not self.given.no_plots)
        write_folder(self.folder, self.files)
        return self._result()

    def _measure(
        self, model: Mixtral, reference: Reference | None
    ) -> tuple[Evaluation, PasskeyResult | None, RoutingAnalysis | None]:
        passkeys, routing = None, None
        with count_progress("evaluating") as show:
            evaluation = evaluate(
                model, self.corpus, window=self.window, stride=self.stride, reference=reference, worst=0,
                progress=predicted(show),
            )  # fmt: skip
        if self.lengths:
            with count_progress("passkeys") as show:
                passkeys = passkey(
                    model, self.lengths, self.depths, trials=self.given.trials, seed=self.given.seed, progress=show
                )
        if self.subject.config.is_dense:
            self.left_out["routing"] = "Left out: this model is dense and has no experts to choose from."
        else:
            with count_progress("routing") as show:
                record = record_texts(
                    model, self.corpus, window=self.window, keep_text=False, name=self.subject.title,
                    progress=predicted(show),
                )  # fmt: skip
            routing = analyse(record)
        return evaluation, passkeys, routing

    def _run(self, model: Mixtral) -> Run:
        dtype = DTYPE_NAMES[compute_dtype(self.loading.dtype, model.device)]
        return Run(
            self.command,
            datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
            {"mlx-mixtral": __version__, "mlx": version("mlx"), "Python": platform.python_version()},
            f"{model.device.name} ({model.device.kind}, {platform.system()} {platform.release()}), computing in {dtype}",
            self._text(),
            self.corpus.sha256,
        )

    def _text(self) -> str:
        """What the text is, in a sentence or two."""
        count, size = len(self.corpus.passages), format_bytes(sum(p.text.nbytes for p in self.corpus.passages))
        amount = f"{plural(count, 'text')}, {size}; at most the first {self.max_bytes:,} bytes of each were used"
        if self.given.texts:
            return amount
        return (
            f"the calibration text that comes with mlx-mixtral (verses, code and sums): {amount}. A conversion that was "
            "calibrated on it, as mlx-mixtral calibrate does by default, looks better on it than on other text"
        )

    def _result(self) -> dict[str, Any]:
        contents, run = self.contents, self.contents.run
        found = self.subject.facts()
        if contents.reference is not None:
            found["reference"] = contents.reference
        found |= {"folder": str(self.folder), "files": sorted(self.files)}
        found |= {"command": run.command, "date": run.date, "versions": run.versions, "machine": run.machine}
        found |= {"checkpoint": contents.facts, "evaluation": contents.evaluation.to_dict()}
        if contents.passkeys is not None:
            found["passkey"] = contents.passkeys.to_dict()
        if contents.routing is not None:
            found["routing"] = contents.routing.to_dict() | {"published": published_beside(contents.routing)}
        return found | {"left_out": contents.left_out}

    def report(self) -> None:
        """What was written, and the figures one looks for first."""
        console, found = out_console(), self.contents.evaluation.overall
        console.print(f"{one_line(self.folder)}: {', '.join(sorted(self.files))}", soft_wrap=True)
        line = f"perplexity {found.perplexity:.4g}, {found.bits_per_byte:.3f} bits per byte"
        if (compared := found.comparison) is not None:
            line += f", KL {compared.kl_mean:.4f} and the same top token in {compared.top1_agreement:.1%}"
            line += f" against {one_line(self.contents.reference)}"
        console.print(line, soft_wrap=True)
        for reason in self.left_out.values():
            note(one_line(reason))


def _check_plotting() -> None:
    try:
        check_plotting()
    except MissingDependencyError as error:
        raise MissingDependencyError(f"{error}, or give --no-plots") from error


def _bundled() -> tuple[str, ...]:
    from mlx_mixtral_convert.calibration.text import default_text_files

    return tuple(str(path) for path in default_text_files())
