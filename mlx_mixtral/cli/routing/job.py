"""One ``routing`` of the program: everything checked first, then the model, then files and tables."""

from __future__ import annotations

from typing import Any

from mlx_mixtral.cli.evaluate.subject import Subject, read_corpus
from mlx_mixtral.cli.progress import count_progress
from mlx_mixtral.cli.routing.tables import print_excerpts, print_routing
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.evaluation.corpus import Corpus, check_window
from mlx_mixtral.evaluation.figures import check_plotting
from mlx_mixtral.evaluation.routing.analysis import RoutingAnalysis, analyse
from mlx_mixtral.evaluation.routing.excerpt import excerpts
from mlx_mixtral.evaluation.routing.page import routing_page
from mlx_mixtral.evaluation.routing.plots import draw_routing
from mlx_mixtral.evaluation.routing.published import PUBLISHED_LAYERS, mean_published, published_for
from mlx_mixtral.evaluation.routing.record import RoutingRecord, trace_file_bytes
from mlx_mixtral.evaluation.routing.recording import record_texts, stretches
from mlx_mixtral.files import check_destination, replace_file

__all__ = ["RoutingJob", "published_beside"]

TERMINAL_SAMPLE, PAGE_SAMPLE = 48, 240


class RoutingJob:
    """Everything checked first; ``run`` records and analyses, ``report`` prints."""

    def __init__(
        self,
        model: str | None,
        *,
        texts: tuple[str, ...],
        trace: str | None,
        text_field: str,
        domain_field: str,
        max_tokens: int | None,
        window: int | None,
        layers: tuple[int, ...] | None,
        sample: int | None,
        no_text: bool,
        save_trace: str | None,
        plot: str | None,
        html: str | None,
        **loading: Any,
    ) -> None:
        self.loading, self.max_tokens, self.keep_text = loading, max_tokens, not no_text
        if sample is not None and sample < 0:
            raise InvalidRequestError(f"sample is {sample}; it must be a number of tokens, 0 for none")
        self.sample = sample
        places = {"--plot": plot, "--html": html, "--save-trace": save_trace}
        found = {name: check_destination(name, path) for name, path in places.items() if path is not None}
        if len(set(found.values())) < len(found):
            raise InvalidRequestError(f"{', '.join(found)} name one file; give each its own")
        self.plot, self.html, self.save_trace = (found.get(name) for name in places)
        if self.plot is not None or self.html is not None:
            check_plotting()
        self.record: RoutingRecord | None = None
        self.corpus: Corpus | None = None
        self.subject = None if model is None else Subject(model, loading["revision"])
        if self.subject is not None and self.subject.config.is_dense:
            raise InvalidRequestError(f"{self.subject.name} is dense: it has no experts to choose from")
        if trace is not None:
            self.record = RoutingRecord.load(trace)
            self._check_shape(self.record)
            size = self.record.trace.experts.shape[1]
        else:
            assert self.subject is not None
            size = self.subject.config.num_hidden_layers
            self._prepare(texts, text_field, domain_field, window)
        for layer in layers or ():
            if not 0 <= layer < size:
                raise InvalidRequestError(f"layer {layer} is not among the model's {size}, 0 to {size - 1}")
        if layers is not None and not layers:
            raise InvalidRequestError("layers is an empty list; name at least one")
        self._layers = None if layers is None else tuple(dict.fromkeys(layers))
        self.analysis: RoutingAnalysis | None = None

    def _check_shape(self, record: RoutingRecord) -> None:
        if self.subject is None:
            return
        config, (_, layers, per_token) = self.subject.config, record.trace.experts.shape
        own = (config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok)
        if (layers, record.trace.num_experts, per_token) != own:
            raise InvalidRequestError(
                f"the trace is of {layers} layers with {per_token} of {record.trace.num_experts} experts a token, "
                f"{self.subject.name} has {own[0]} with {own[2]} of {own[1]}; give the model it was recorded from, or none"
            )

    def _prepare(self, texts: tuple[str, ...], text_field: str, domain_field: str, window: int | None) -> None:
        """What can be refused before weights are read: the text, the window, the size of the trace file."""
        assert self.subject is not None
        config, given = self.subject.config, read_corpus(texts, text_field, domain_field, None)
        self.window, _ = check_window(window, None, config.max_position_embeddings)
        if self.loading["context"] is None:
            # A memory budget reserves KV cache for no more than the longest sequence there will be.
            self.loading["context"] = self.window
        self.corpus = self.subject.encode(given)
        parts = stretches(self.corpus, self.subject.tokenizer.encode(""), self.window, self.max_tokens)
        if self.save_trace is not None:
            trace_file_bytes(
                sum(len(part.ids) for part in parts),
                config.num_hidden_layers,
                config.num_experts_per_tok,
                sum(passage.text.nbytes for passage in self.corpus.passages) if self.keep_text else 0,
                len(parts),
            )

    def run(self) -> dict[str, Any]:
        """The result as JSON has it; files are written."""
        if self.record is None:
            assert self.subject is not None
            assert self.corpus is not None
            with self.subject.load(self.loading) as model, count_progress("reading") as show:
                self.record = record_texts(
                    model,
                    self.corpus,
                    window=self.window,
                    max_tokens=self.max_tokens,
                    keep_text=self.keep_text,
                    name=self.subject.name,
                    progress=lambda at: show(at.done_tokens, at.total_tokens),
                )
        if self.save_trace is not None:
            self.record.save(self.save_trace)
        self.analysis = found = analyse(self.record)
        if self.plot is not None:
            replace_file(self.plot, draw_routing(found, self.layers))
        if self.html is not None:
            sample = PAGE_SAMPLE if self.sample is None else self.sample
            page = routing_page(found, excerpts(self.record, sample) if self.keep_text else [], self.layers)
            replace_file(self.html, page.encode())
        return found.to_dict() | {"published": published_beside(found)}

    @property
    def layers(self) -> tuple[int, ...]:
        """Those shown one by one."""
        assert self.analysis is not None
        return self.analysis.shown_layers if self._layers is None else self._layers

    def report(self) -> None:
        """Tables on stdout."""
        assert self.analysis is not None
        assert self.record is not None
        print_routing(self.analysis, self.layers)
        sample = TERMINAL_SAMPLE if self.sample is None else self.sample
        if self.keep_text:
            print_excerpts(excerpts(self.record, sample), self.layers, self.analysis.num_experts)


def published_beside(found: RoutingAnalysis) -> dict[str, Any]:
    """The paper's table 5 for the domains it has, by our names."""
    rows = {name: row for name in found.domains if (row := published_for(name)) is not None}
    return {
        "layers": PUBLISHED_LAYERS,
        "overall": mean_published()._asdict(),
        "domains": {name: row._asdict() for name, row in rows.items()},
    }
