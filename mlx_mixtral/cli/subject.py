"""What commands measure: models of which the files are known before the weights are read, and texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_mixtral import Mixtral, MixtralConfig, Tokenizer
from mlx_mixtral.arguments import as_path, check_integer
from mlx_mixtral.cli.adapters import AdapterFacts, fetch_adapters, look_at
from mlx_mixtral.cli.load import load_model
from mlx_mixtral.cli.options import LoadOptions, RecordOptions
from mlx_mixtral.cli.progress import count_progress, fetch
from mlx_mixtral.config.overrides import settings_of
from mlx_mixtral.errors import CheckpointError, InvalidRequestError
from mlx_mixtral.evaluation.corpus import Corpus, TokenProgress, check_window, encode_texts, vocabulary_sha256
from mlx_mixtral.evaluation.journal import EvaluationJournal
from mlx_mixtral.evaluation.perplexity import evaluate
from mlx_mixtral.evaluation.reference import Reference, ReferenceHeader
from mlx_mixtral.evaluation.texts import Text, read_texts
from mlx_mixtral.hub import Source
from mlx_mixtral.tokenizer import load_tokenizer
from mlx_mixtral.weights.fingerprint import checkpoint_identity

__all__ = ["Baseline", "Subject", "predicted", "read_corpus"]


def read_corpus(paths: tuple[str, ...], records: RecordOptions, max_bytes: int | None = None) -> list[Text]:
    """Texts, each cut to whole characters of its first ``max_bytes``.

    Raises:
        InvalidRequestError: see ``read_texts``.
    """
    if max_bytes is not None:
        check_integer("max-bytes", max_bytes, 1, wanted="at least 1")
    texts = read_texts(paths, text_field=records.text_field, domain_field=records.domain_field)
    if max_bytes is None:
        return texts
    return [replace(text, text=text.text.encode()[:max_bytes].decode(errors="ignore")) for text in texts]


class Subject:
    """A model by its folder: configuration as it is run, its adapter, tokenizer and identity, without weights.

    Raises:
        CheckpointError, ConfigError, HubError, TokenizerError: it cannot be found or read.
    """

    def __init__(self, source: str, loading: LoadOptions) -> None:
        overrides, self._overrides = loading.overrides.checked, loading.overrides
        self.folder = fetch(source, revision=loading.revision)
        self._kind = loading.tokenizer
        self.name = Source.parse(source, loading.revision).repository or self.folder.resolve().name
        self._own_config = MixtralConfig.from_folder(self.folder)
        self.config = overrides.apply(self._own_config, loading.context)
        self._adapters = fetch_adapters(loading.adapters)
        self.adapter: AdapterFacts | None = look_at(self._adapters[0], self.config) if self._adapters else None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        eos = self.config.eos_token_ids
        return load_tokenizer(self.folder, vocab_size=self.config.vocab_size, eos_token_ids=eos, kind=self._kind)

    @property
    def title(self) -> str:
        """Its name, and that of its adapter."""
        return self.name if self.adapter is None else f"{self.name} with {self.adapter.title}"

    @property
    def adapter_folder(self) -> Path | None:
        """Where its adapter lies."""
        return Path(self._adapters[0].path) if self._adapters else None

    @cached_property
    def identity(self) -> str:
        """Tells what it computes from what others do: other weights, settings, adapters, scales of them."""
        adapter = "" if self.adapter is None else f"adapter {self.adapter.identity}"
        parts = checkpoint_identity(self.folder), settings_of(self.config, self._own_config), adapter
        return " ".join(filter(None, parts))

    def facts(self) -> dict[str, Any]:
        """How results name it, as JSON has it."""
        return {"model": self.name, "adapter": None if self.adapter is None else self.adapter.to_dict()}

    def encode(self, texts: list[Text]) -> Corpus:
        return encode_texts(self.tokenizer, texts)

    def check_comparable(self, other: Subject, window: int, stride: int) -> None:
        """Raise InvalidRequestError unless this reference predicts the same tokens as ``other``, in such windows."""
        sizes = self.config.vocab_size, other.config.vocab_size
        if sizes[0] != sizes[1] or vocabulary_sha256(self.tokenizer) != vocabulary_sha256(other.tokenizer):
            what = f"{sizes[0]} tokens" if sizes[0] != sizes[1] else f"{sizes[0]} tokens too, but different pieces"
            raise InvalidRequestError(
                f"reference {self.name} has another vocabulary: {what}, {other.name} has {sizes[1]}; distributions over "
                "different tokens cannot be compared: give the model that this one was made from"
            )
        check_window(window, stride, self.config.max_context_tokens)

    def header(self, corpus: Corpus, window: int, stride: int, top_k: int) -> ReferenceHeader:
        """What a reference file of this model says."""
        return ReferenceHeader(
            self.title, self.identity, corpus.sha256, corpus.vocabulary, self.config.vocab_size, window, stride,
            corpus.tokens, top_k,
        )  # fmt: skip

    def find(self, place: Path, header: ReferenceHeader) -> Reference | None:
        """A finished file of an earlier run, if it is what would be made now."""
        try:
            found = Reference(place)
        except CheckpointError:
            return None
        return found if found.header == header else None

    def load(self, options: LoadOptions) -> Mixtral:
        """The model itself; close it when done."""
        own = replace(options, revision=None, adapters=self._adapters, overrides=self._overrides)
        return load_model(self.folder, own).model

    def make_reference(
        self,
        place: Path,
        header: ReferenceHeader,
        corpus: Corpus,
        options: LoadOptions,
        journal: EvaluationJournal | None = None,
    ) -> Reference:
        """Run this model over ``corpus`` and keep its distributions in ``place``; it is loaded for that alone."""
        with self.load(replace(options, verify=False)) as model, count_progress("reference") as show:
            evaluate(
                model,
                corpus,
                window=header.window,
                stride=header.stride,
                save_reference=place,
                top_k=header.top_k,
                name=header.model,
                identity=header.identity,
                journal=journal,
                progress=predicted(show),
            )
        return Reference(place)


class Baseline:
    """What a model is compared with: a file of distributions, another model that is run first, or nothing.

    The other model is run with the same rope, which long windows may need, and with its own number of experts per token,
    without an adapter.

    Raises:
        CheckpointError: a file that is something else.
    """

    def __init__(self, name: str | None, loading: LoadOptions) -> None:
        self.name = name
        overrides = replace(loading.overrides, experts_per_token=None)
        self._loading = replace(loading, revision=None, adapters=(), overrides=overrides)
        self.file = Reference(as_path("reference", name)) if name is not None and _is_file(name) else None
        self.other: Subject | None = None

    def windows(
        self, subject: Subject, corpus: Corpus, window: int | None, stride: int | None = None
    ) -> tuple[int, int]:
        """Window and stride to read ``corpus`` with: as given, as in the file, or the usual.

        Raises:
            InvalidRequestError: they are none, or the baseline does not predict the same tokens in them.
        """
        vocab_size, limit = subject.config.vocab_size, subject.config.max_context_tokens
        if self.file is not None:
            window, stride = window or self.file.header.window, stride or self.file.header.stride
        checked = check_window(window, stride, limit)
        if self.file is not None:
            self.file.header.check_text(corpus, vocab_size, *checked, self.file.path)
        elif self.name is not None:
            self.other = Subject(self.name, self._loading)
            self.other.check_comparable(subject, *checked)
        return checked


def _is_file(name: str) -> bool:
    try:
        return as_path("reference", name).is_file()
    except (OSError, ValueError):  # a name too long for the file system
        return False


def predicted(show: Callable[[int, int], None]) -> Callable[[TokenProgress], None]:
    """Shows how far an evaluation is."""
    return lambda at: show(at.done_tokens, at.total_tokens)
