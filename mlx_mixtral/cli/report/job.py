"""One ``report`` of the program: everything checked first, then the reference model, then the model, then the folder."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_mixtral import Mixtral, __version__
from mlx_mixtral.cli.console import note, one_line, out_console
from mlx_mixtral.cli.evaluate.subject import Subject, is_reference_file, predicted, read_corpus
from mlx_mixtral.cli.info.checkpoint import checkpoint_report
from mlx_mixtral.cli.info.shape import PART_NAMES
from mlx_mixtral.cli.progress import count_progress
from mlx_mixtral.cli.routing.job import published_beside
from mlx_mixtral.errors import CheckpointError, InvalidRequestError, MissingDependencyError
from mlx_mixtral.evaluation.corpus import check_window
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
from mlx_mixtral.info.estimate import WORKING_BYTES
from mlx_mixtral.info.macs import USABLE_NOTE
from mlx_mixtral.machine.device import DTYPE_NAMES, compute_dtype
from mlx_mixtral.sizes import format_bytes

__all__ = ["ReportJob"]

MAX_BYTES, QUICK_BYTES = 32768, 4096
LENGTHS, QUICK_LENGTHS = (512, 1024, 2048, 4096), (512, 1024)
QUICK_DEPTHS = (0.0, 0.5, 1.0)


class ReportJob:
    """Everything that can be refused is refused here, before weights are read; ``run`` measures and writes."""

    def __init__(
        self,
        model: str,
        *,
        command: str,
        reference: str | None,
        texts: tuple[str, ...],
        text_field: str,
        domain_field: str,
        quick: bool,
        max_bytes: int | None,
        window: int | None,
        lengths: tuple[int, ...] | None,
        depths: tuple[float, ...] | None,
        trials: int,
        seed: int,
        output: str | None,
        overwrite: bool,
        no_plots: bool,
        **loading: Any,
    ) -> None:
        self.command, self.loading, self.with_plots = command, loading, not no_plots
        self.trials, self.seed, self.left_out = trials, seed, dict[str, str]()
        if self.with_plots:
            _check_plotting()
        self.subject = Subject(model, loading["revision"])
        place = f"{self.subject.name.rpartition('/')[2]}-report" if output is None else output
        self.folder = check_folder("--output", place, overwrite=overwrite, holds=(SECTION_FILE, "plots"))
        self.max_bytes = (QUICK_BYTES if quick else MAX_BYTES) if max_bytes is None else max_bytes
        self.paths = texts
        given = read_corpus(texts or _bundled(), text_field, domain_field, self.max_bytes)
        self.facts = self._facts()
        self.corpus = self.subject.encode(given)

        limit, vocab_size = self.subject.config.max_position_embeddings, self.subject.config.vocab_size
        self.other: Subject | None = None
        self.file = Reference(Path(reference)) if reference and is_reference_file(reference) else None
        if self.file is not None:
            window = window or self.file.header.window
        self.window, self.stride = check_window(window, None if self.file is None else self.file.header.stride, limit)
        if self.file is not None:
            self.file.header.check_text(self.corpus, vocab_size, self.window, self.stride, self.file.path)
        elif reference:
            self.other = Subject(reference, None)
            self.other.check_comparable(self.subject, self.window, self.stride)
            self._header().check_size()
        self.depths = (QUICK_DEPTHS if quick else DEFAULT_DEPTHS) if depths is None else depths
        self.lengths = self._lengths(lengths, QUICK_LENGTHS if quick else LENGTHS)
        if loading["context"] is None:
            # A memory budget reserves KV cache for no more than the longest sequence there will be.
            loading["context"] = max(self.window, *self.lengths, 1)

    def _facts(self) -> Mapping[str, Any]:
        """What ``info`` has of the checkpoint."""
        facts = checkpoint_report(self.subject.folder, ())
        if facts["problem"]:
            raise CheckpointError(f"{self.subject.name} does not load: {facts['problem']}")
        return facts | {"parts": [part | {"part": PART_NAMES[part["part"]]} for part in facts["parts"]]}

    def _lengths(self, lengths: tuple[int, ...] | None, usual: tuple[int, ...]) -> tuple[int, ...]:
        """Of passkey prompts; none, with the reason noted, where the context has no room for one."""
        limit, tokenizer = self.subject.config.max_position_embeddings, self.subject.tokenizer
        found = lengths
        if found is None:
            found = tuple(length for length in usual if length <= limit) or (limit,)
            try:
                check_passkey(tokenizer, found[:1], (0.5,), 1, 0, limit)
            except InvalidRequestError as error:
                self.left_out["passkeys"] = f"Passkey retrieval is left out: {error}."
                found = ()
        if found or lengths is not None:
            check_passkey(tokenizer, found, self.depths, self.trials, self.seed, limit)
        return found

    def _header(self) -> ReferenceHeader:
        assert self.other is not None
        top_k = min(DEFAULT_TOP_K, self.subject.config.vocab_size)
        return self.other.header(self.corpus, self.window, self.stride, top_k)

    def run(self) -> dict[str, Any]:
        """The result as JSON has it; the folder is written."""
        with tempfile.TemporaryDirectory(prefix="mlx-mixtral-report-") as scratch:
            reference = self.file
            if self.other is not None:
                reference = self.other.make_reference(
                    Path(scratch) / "reference", self._header(), self.corpus, self.loading
                )
            with self.subject.load(self.loading) as model:
                evaluation, passkeys, routing = self._measure(model, reference)
        if not fills_window(evaluation):
            self.left_out["by length"] = (
                "Perplexity by length of context is left out: the texts are too short to fill the longest context."
            )
        self.contents = Contents(
            self.subject.name,
            self.facts,
            evaluation,
            self._run(model),
            None if reference is None else reference.header.model,
            passkeys,
            routing,
            self.left_out,
            f"{USABLE_NOTE}, less {format_bytes(WORKING_BYTES)} to work in.",
        )
        self.files = report_files(self.contents, with_plots=self.with_plots)
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
                passkeys = passkey(model, self.lengths, self.depths, trials=self.trials, seed=self.seed, progress=show)
        if self.subject.config.is_dense:
            self.left_out["routing"] = "Left out: this model is dense, it has no experts to choose from."
        else:
            with count_progress("routing") as show:
                record = record_texts(
                    model, self.corpus, window=self.window, keep_text=False, name=self.subject.name,
                    progress=lambda at: show(at.done_tokens, at.total_tokens),
                )  # fmt: skip
            routing = analyse(record)
        return evaluation, passkeys, routing

    def _run(self, model: Mixtral) -> Run:
        dtype = DTYPE_NAMES[compute_dtype(self.loading["dtype"], model.device)]
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
        amount = (
            f"{count} text{'s' * (count != 1)}, {size}; of each at most the first {self.max_bytes:,} bytes were taken"
        )
        if self.paths:
            return amount
        return (
            f"the calibration text that comes with mlx-mixtral, verses, code and sums: {amount}. A conversion that was "
            "calibrated on it, as mlx-mixtral calibrate does by default, looks better on it than on others"
        )

    def _result(self) -> dict[str, Any]:
        contents, run = self.contents, self.contents.run
        found: dict[str, Any] = {"model": contents.model}
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
