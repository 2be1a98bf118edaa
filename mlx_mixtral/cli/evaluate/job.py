"""One ``evaluate`` of the program: everything checked first, then the reference model, then the model, files and tables."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from mlx_mixtral import __version__
from mlx_mixtral.cli.console import json_text
from mlx_mixtral.cli.evaluate.subject import Subject, is_reference_file, predicted, read_corpus
from mlx_mixtral.cli.evaluate.tables import print_evaluation, print_lengths, print_passkeys
from mlx_mixtral.cli.progress import count_progress
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.evaluation.corpus import Corpus, check_window
from mlx_mixtral.evaluation.figures import check_plotting
from mlx_mixtral.evaluation.journal import Journal
from mlx_mixtral.evaluation.passkey import DEFAULT_DEPTHS, PasskeyResult, check_passkey, default_lengths, passkey
from mlx_mixtral.evaluation.perplexity import evaluate
from mlx_mixtral.evaluation.plots import draw_long_context
from mlx_mixtral.evaluation.reference import DEFAULT_TOP_K, Reference, check_replaceable
from mlx_mixtral.evaluation.results import Evaluation
from mlx_mixtral.files import check_destination, replace_file
from mlx_mixtral.weights.fingerprint import file_identity

__all__ = ["EvaluationJob"]


class EvaluationJob:
    """Everything checked first, then the reference, then the model."""

    def __init__(
        self,
        model: str,
        *,
        texts: tuple[str, ...],
        text_field: str,
        domain_field: str,
        max_bytes: int | None,
        window: int | None,
        stride: int | None,
        reference: str | None,
        save_reference: str | None,
        top_k: int | None,
        worst: int,
        by_length: bool,
        passkey: bool,
        lengths: tuple[int, ...] | None,
        depths: tuple[float, ...] | None,
        trials: int,
        seed: int,
        plot: str | None,
        output: str | None,
        resume: str | None,
        restart: bool,
        **loading: Any,
    ) -> None:
        self.loading, self.worst, self.seed, self.trials, self.restart = loading, worst, seed, trials, restart
        self.by_length, self.top_k = by_length, DEFAULT_TOP_K if top_k is None else top_k
        places = {"--plot": plot, "--output": output, "--save-reference": save_reference, "--resume": resume}
        found = {name: check_destination(name, path) for name, path in places.items() if path is not None}
        if len(set(found.values())) < len(found):
            raise InvalidRequestError(f"{', '.join(found)} name one file; give each its own")
        if "--save-reference" in found:
            check_replaceable(found["--save-reference"])
        self.plot, self.output, self.save = (found.get(name) for name in ("--plot", "--output", "--save-reference"))
        self.journal_path = found.get("--resume")
        if self.journal_path is None and self.output is not None:
            self.journal_path = self.output.with_name(f"{self.output.name}.journal")
        if self.plot is not None:
            check_plotting()
        given = read_corpus(texts, text_field, domain_field, max_bytes) if texts else []
        self.file = Reference(Path(reference)) if reference and is_reference_file(reference) else None
        if self.file is not None and (save_reference or top_k is not None):
            raise click.UsageError("--save-reference and --top-k make a reference; --reference names one that is made")

        self.subject = Subject(model, loading["revision"])
        limit = self.subject.config.max_position_embeddings
        self.lengths = (lengths or default_lengths(limit)) if passkey else ()
        self.depths = DEFAULT_DEPTHS if depths is None else depths
        if passkey:
            check_passkey(self.subject.tokenizer, self.lengths, self.depths, trials, seed, limit)
        self.corpus: Corpus | None = None
        self.other: Subject | None = None
        if given:
            self.corpus = self.subject.encode(given)
            if self.file is not None:
                window, stride = window or self.file.header.window, stride or self.file.header.stride
            self.window, self.stride = check_window(limit if by_length and window is None else window, stride, limit)
            if self.file is not None:
                vocab_size = self.subject.config.vocab_size
                self.file.header.check_text(self.corpus, vocab_size, self.window, self.stride, self.file.path)
            elif reference:
                self.other = Subject(reference, None)
                self.other.check_comparable(self.subject, self.window, self.stride)
            if self.other is not None or self.save is not None:
                (self.other or self.subject).header(self.corpus, self.window, self.stride, self.top_k).check_size()
        # A memory budget reserves KV cache for no more than the longest sequence there will be.
        if loading["context"] is None:
            loading["context"] = max([self.window if given else 1, *self.lengths])
        self.reference_name: str | None = None
        self.evaluation: Evaluation | None = None
        self.passkeys: PasskeyResult | None = None

    def run(self) -> dict[str, Any]:
        """The result as JSON has it; files are written."""
        with ExitStack() as stack:
            # Left last: what is made for the run alone goes once the journal has.
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlx-mixtral-evaluate-")))
            journal = stack.enter_context(Journal(self.journal_path, self._identity(), restart=self.restart))
            reference = self._reference(journal, scratch)
            self._evaluate(journal, reference)
            if self.plot is not None:
                buckets = self.evaluation.by_length if self.evaluation is not None and self.by_length else []
                replace_file(self.plot, draw_long_context(self.subject.name, self.passkeys, buckets))
            found = self._result(reference)
            if self.output is not None:
                replace_file(self.output, (json_text(found) + "\n").encode())
            if reference is not None and reference.path == self._kept_reference:
                reference.path.unlink()
        return found

    def report(self) -> None:
        """Tables on stdout."""
        if self.evaluation is not None:
            print_evaluation(self.subject.name, self.reference_name, self.evaluation)
            if self.by_length:
                print_lengths(self.evaluation)
        if self.passkeys is not None:
            print_passkeys(self.passkeys)

    @property
    def _kept_reference(self) -> Path | None:
        """Where the reference model's distributions wait when the run can go on later."""
        return None if self.journal_path is None else self.journal_path.with_name(f"{self.journal_path.name}.reference")

    def _identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = {"version": __version__, "model": self.subject.identity}
        identity |= {name: value for name, value in self.loading.items() if name == "dtype" or name.startswith("kv_")}
        if self.corpus is not None:
            identity |= {"text": self.corpus.sha256, "window": self.window, "stride": self.stride}
        if self.file is not None:
            identity["reference"] = file_identity(self.file.path)
        if self.other is not None:
            identity["reference"] = self.other.identity
        if self.other is not None or self.save is not None:
            identity["top_k"] = self.top_k
        if self.lengths:
            identity |= {"lengths": self.lengths, "depths": self.depths, "trials": self.trials, "seed": self.seed}
        return identity

    def _reference(self, journal: Journal, scratch: Path) -> Reference | None:
        """The file, made by running the other model where one was named."""
        if self.other is None or self.corpus is None:
            return self.file
        place = self.save or self._kept_reference or scratch / "reference"
        header = self.other.header(self.corpus, self.window, self.stride, self.top_k)
        if (made := self.other.find(place, header)) is None:
            made = self.other.make_reference(place, header, self.corpus, self.loading, journal)
        return made

    def _evaluate(self, journal: Journal, reference: Reference | None) -> None:
        with self.subject.load(self.loading) as model:
            if self.corpus is not None:
                with count_progress("evaluating") as show:
                    self.evaluation = evaluate(
                        model,
                        self.corpus,
                        window=self.window,
                        stride=self.stride,
                        reference=reference,
                        save_reference=self.save if self.other is None else None,
                        top_k=self.top_k,
                        worst=self.worst,
                        name=self.subject.name,
                        identity=self.subject.identity if self.save else "",
                        journal=journal,
                        progress=predicted(show),
                    )
            if self.lengths:
                with count_progress("passkeys") as show:
                    self.passkeys = passkey(
                        model,
                        self.lengths,
                        self.depths,
                        trials=self.trials,
                        seed=self.seed,
                        journal=journal,
                        progress=show,
                    )

    def _result(self, reference: Reference | None) -> dict[str, Any]:
        found: dict[str, Any] = {"model": self.subject.name}
        if reference is not None:
            found["reference"] = self.reference_name = reference.header.model
        if self.evaluation is not None:
            found |= self.evaluation.to_dict()
        if self.passkeys is not None:
            found["passkey"] = self.passkeys.to_dict()
        return found
