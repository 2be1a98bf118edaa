"""One ``evaluate`` of the program: everything checked first, then the reference model, then the model, files and tables."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mlx_mixtral import __version__
from mlx_mixtral.cli.console import json_text
from mlx_mixtral.cli.destinations import EVALUATION, PLOT, ask_to_replace, check_destinations, journal_path
from mlx_mixtral.cli.evaluate.options import EvaluateOptions
from mlx_mixtral.cli.evaluate.tables import print_evaluation, print_lengths, print_passkeys
from mlx_mixtral.cli.progress import count_progress
from mlx_mixtral.cli.subject import Baseline, Subject, predicted, read_corpus
from mlx_mixtral.evaluation.corpus import Corpus
from mlx_mixtral.evaluation.figures import check_plotting
from mlx_mixtral.evaluation.journal import EvaluationJournal
from mlx_mixtral.evaluation.passkey import DEFAULT_DEPTHS, PasskeyResult, check_passkey, default_lengths, passkey
from mlx_mixtral.evaluation.perplexity import evaluate
from mlx_mixtral.evaluation.plots import draw_long_context
from mlx_mixtral.evaluation.reference import DEFAULT_TOP_K, Reference, check_replaceable
from mlx_mixtral.evaluation.results import Evaluation
from mlx_mixtral.files import replace_file
from mlx_mixtral.leftovers import scratch_folder
from mlx_mixtral.weights.fingerprint import file_identity

__all__ = ["EvaluationJob"]


class EvaluationJob:
    """Everything checked first, then the reference, then the model."""

    def __init__(self, given: EvaluateOptions) -> None:
        self.given, self.top_k = given, DEFAULT_TOP_K if given.top_k is None else given.top_k
        places = check_destinations(
            {
                "--plot": given.plot,
                "--output": given.output,
                "--save-reference": given.save_reference,
                "--resume": given.resume,
            },
            {"--plot": PLOT, "--output": EVALUATION},
            overwrite=given.overwrite,
        )
        self.plot, self.output, self.save = (places.get(name) for name in ("--plot", "--output", "--save-reference"))
        self.journal_path = journal_path(places)
        if self.save is not None:
            check_replaceable(self.save)
        if self.plot is not None:
            check_plotting()
        texts = read_corpus(given.texts, given.records, given.max_bytes) if given.texts else []
        self.baseline = Baseline(given.reference, given.loading)
        if self.baseline.file is not None and (given.save_reference or given.top_k is not None):
            raise click.UsageError(
                "--save-reference and --top-k create a reference, but --reference names an existing one; leave out one of them"
            )

        self.subject = Subject(given.model, given.loading)
        limit = self.subject.config.max_context_tokens
        self.lengths = (given.lengths or default_lengths(limit)) if given.passkey else ()
        self.depths = DEFAULT_DEPTHS if given.depths is None else given.depths
        if given.passkey:
            check_passkey(self.subject.tokenizer, self.lengths, self.depths, given.trials, given.seed, limit)
        self.corpus: Corpus | None = None
        longest = 1
        if texts:
            self.corpus = self.subject.encode(texts)
            window = given.window
            if window is None and given.by_length and self.baseline.file is None:
                window = limit
            self.window, self.stride = self.baseline.windows(self.subject, self.corpus, window, given.stride)
            longest = self.window
            if (kept := self.baseline.other or (self.subject if self.save else None)) is not None:
                header = kept.header(self.corpus, self.window, self.stride, self.top_k)
                header.check_size()
                # What would be made now is no loss.
                if self.save is not None and kept.find(self.save, header) is None:
                    ask_to_replace(self.save, overwrite=given.overwrite)
        # A memory budget reserves KV cache for no more than the longest sequence there will be.
        context = max([longest, *self.lengths]) if given.loading.context is None else given.loading.context
        self.loading = replace(given.loading, context=context)
        self.reference_name: str | None = None
        self.evaluation: Evaluation | None = None
        self.passkeys: PasskeyResult | None = None

    def run(self) -> dict[str, Any]:
        """The result as JSON has it; files are written."""
        with ExitStack() as stack:
            # Left last: what is made for the run alone goes once the journal has.
            scratch = stack.enter_context(scratch_folder("evaluate"))
            journal = stack.enter_context(
                EvaluationJournal(self.journal_path, self._identity(), restart=self.given.restart)
            )
            reference = self._reference(journal, scratch)
            self._evaluate(journal, reference)
            if self.plot is not None:
                buckets = self.evaluation.by_length if self.evaluation is not None and self.given.by_length else []
                replace_file(self.plot, draw_long_context(self.subject.title, self.passkeys, buckets))
            found = self._result(reference)
            if self.output is not None:
                replace_file(self.output, (json_text(found) + "\n").encode())
            if reference is not None and reference.path == self._kept_reference:
                reference.path.unlink()
        return found

    def report(self) -> None:
        """Tables on stdout."""
        if self.evaluation is not None:
            print_evaluation(self.subject.title, self.reference_name, self.evaluation)
            if self.given.by_length:
                print_lengths(self.evaluation)
        if self.passkeys is not None:
            print_passkeys(self.passkeys)

    @property
    def _kept_reference(self) -> Path | None:
        """Where the reference model's distributions wait when the run can go on later."""
        return None if self.journal_path is None else self.journal_path.with_name(f"{self.journal_path.name}.reference")

    def _identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = {"version": __version__, "model": self.subject.identity, **self.loading.identity()}
        file, other = self.baseline.file, self.baseline.other
        if self.corpus is not None:
            identity |= {"text": self.corpus.sha256, "window": self.window, "stride": self.stride}
        if file is not None:
            identity["reference"] = file_identity(file.path)
        if other is not None:
            identity["reference"] = other.identity
        if other is not None or self.save is not None:
            identity["top_k"] = self.top_k
        if self.lengths:
            identity |= {"lengths": self.lengths, "depths": self.depths}
            identity |= {"trials": self.given.trials, "seed": self.given.seed}
        return identity

    def _reference(self, journal: EvaluationJournal, scratch: Path) -> Reference | None:
        """The file, made by running the other model where one was named."""
        other = self.baseline.other
        if other is None or self.corpus is None:
            return self.baseline.file
        place = self.save or self._kept_reference or scratch / "reference"
        header = other.header(self.corpus, self.window, self.stride, self.top_k)
        return other.find(place, header) or other.make_reference(place, header, self.corpus, self.loading, journal)

    def _evaluate(self, journal: EvaluationJournal, reference: Reference | None) -> None:
        with self.subject.load(self.loading) as model:
            if self.corpus is not None:
                with count_progress("evaluating") as show:
                    self.evaluation = evaluate(
                        model,
                        self.corpus,
                        window=self.window,
                        stride=self.stride,
                        reference=reference,
                        save_reference=self.save if self.baseline.other is None else None,
                        top_k=self.top_k,
                        worst=self.given.worst,
                        name=self.subject.title,
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
                        trials=self.given.trials,
                        seed=self.given.seed,
                        journal=journal,
                        progress=show,
                    )

    def _result(self, reference: Reference | None) -> dict[str, Any]:
        found = self.subject.facts()
        if reference is not None:
            found["reference"] = self.reference_name = reference.header.model
        if self.evaluation is not None:
            found |= self.evaluation.to_dict()
        if self.passkeys is not None:
            found["passkey"] = self.passkeys.to_dict()
        return found
