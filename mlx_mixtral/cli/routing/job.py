"""One ``routing`` of the program: everything checked first, then the model, then files and tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlx_mixtral.arguments import check_integer
from mlx_mixtral.cli.destinations import PAGE, PLOT, TRACE, check_destinations
from mlx_mixtral.cli.progress import count_progress
from mlx_mixtral.cli.routing.options import RoutingOptions
from mlx_mixtral.cli.routing.tables import print_excerpts, print_routing
from mlx_mixtral.cli.subject import Subject, predicted, read_corpus
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.evaluation.corpus import Corpus, check_window
from mlx_mixtral.evaluation.figures import check_plotting
from mlx_mixtral.evaluation.routing.analysis import RoutingAnalysis, analyse
from mlx_mixtral.evaluation.routing.excerpt import Excerpt, excerpts
from mlx_mixtral.evaluation.routing.page import routing_page
from mlx_mixtral.evaluation.routing.plots import draw_routing
from mlx_mixtral.evaluation.routing.published import PUBLISHED_LAYERS, mean_published, published_for
from mlx_mixtral.evaluation.routing.record import RoutingRecord, trace_file_bytes
from mlx_mixtral.evaluation.routing.recording import record_texts, stretches
from mlx_mixtral.files import replace_file

__all__ = ["RoutingJob", "published_beside"]

TERMINAL_SAMPLE, PAGE_SAMPLE = 48, 240


class RoutingJob:
    """Everything checked first; ``run`` records and analyses, ``report`` prints."""

    def __init__(self, given: RoutingOptions) -> None:
        self.given, self.loading = given, given.loading
        if given.sample is not None:
            check_integer("sample", given.sample, 0, wanted="a number of tokens, 0 for none")
        self.places = check_destinations(
            {"--plot": given.plot, "--html": given.html, "--save-trace": given.save_trace},
            {"--plot": PLOT, "--html": PAGE, "--save-trace": TRACE},
            overwrite=given.overwrite,
        )
        if given.plot is not None or given.html is not None:
            check_plotting()
        self.record: RoutingRecord | None = None
        self.corpus: Corpus | None = None
        self.subject = None if given.model is None else Subject(given.model, given.loading)
        if self.subject is not None and self.subject.config.is_dense:
            raise InvalidRequestError(f"{self.subject.name} is dense: it has no experts to choose from")
        if given.trace is not None:
            self.record = RoutingRecord.load(given.trace)
            self._check_shape(self.record)
            size = self.record.trace.experts.shape[1]
        else:
            assert self.subject is not None
            size = self.subject.config.num_hidden_layers
            self._prepare(self.subject)
        for layer in given.layers or ():
            if not 0 <= layer < size:
                raise InvalidRequestError(f"layer {layer} is not among the model's {size}, 0 to {size - 1}")
        if given.layers is not None and not given.layers:
            raise InvalidRequestError("layers is an empty list; name at least one")
        self.analysis: RoutingAnalysis | None = None

    def _check_shape(self, record: RoutingRecord) -> None:
        if self.subject is None:
            return
        config, (_, layers, per_token) = self.subject.config, record.trace.experts.shape
        own = (config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok)
        if (layers, record.trace.num_experts, per_token) != own:
            raise InvalidRequestError(
                f"the trace is of {layers} layers with {per_token} of {record.trace.num_experts} experts per token, "
                f"{self.subject.name} has {own[0]} with {own[2]} of {own[1]}; give the model it was recorded "
                "from, or leave out MODEL"
            )

    def _prepare(self, subject: Subject) -> None:
        """What can be refused before weights are read: the text, the window, the size of the trace file."""
        given, config = self.given, subject.config
        texts = read_corpus(given.texts, given.records)
        self.window, _ = check_window(given.window, None, config.max_context_tokens)
        if given.loading.context is None:
            # A memory budget reserves KV cache for no more than the longest sequence there will be.
            self.loading = replace(given.loading, context=self.window)
        self.corpus = subject.encode(texts)
        parts = stretches(self.corpus, subject.tokenizer.encode(""), self.window, given.max_tokens)
        if given.save_trace is not None:
            trace_file_bytes(
                sum(len(part.ids) for part in parts),
                config.num_hidden_layers,
                config.num_experts_per_tok,
                0 if given.no_text else sum(passage.text.nbytes for passage in self.corpus.passages),
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
                    max_tokens=self.given.max_tokens,
                    keep_text=not self.given.no_text,
                    name=self.subject.title,
                    progress=predicted(show),
                )
        if (trace := self.places.get("--save-trace")) is not None:
            self.record.save(trace)
        self.analysis = found = analyse(self.record)
        if (plot := self.places.get("--plot")) is not None:
            replace_file(plot, draw_routing(found, self.layers))
        if (html := self.places.get("--html")) is not None:
            replace_file(html, routing_page(found, self._excerpts(PAGE_SAMPLE), self.layers).encode())
        return found.to_dict() | {"published": published_beside(found)}

    @property
    def layers(self) -> tuple[int, ...]:
        """Those shown one by one."""
        assert self.analysis is not None
        chosen = self.given.layers
        return self.analysis.shown_layers if chosen is None else tuple(dict.fromkeys(chosen))

    def report(self) -> None:
        """Tables on stdout."""
        assert self.analysis is not None
        print_routing(self.analysis, self.layers)
        print_excerpts(self._excerpts(TERMINAL_SAMPLE), self.layers, self.analysis.num_experts)

    def _excerpts(self, usual: int) -> list[Excerpt]:
        """Text to colour, ``usual`` tokens of each domain unless otherwise given."""
        assert self.record is not None
        sample = usual if self.given.sample is None else self.given.sample
        return [] if self.given.no_text else excerpts(self.record, sample)


def published_beside(found: RoutingAnalysis) -> dict[str, Any]:
    """The paper's table 5 for the domains it has, by our names."""
    rows = {name: row for name in found.domains if (row := published_for(name)) is not None}
    return {
        "layers": PUBLISHED_LAYERS,
        "overall": mean_published()._asdict(),
        "domains": {name: row._asdict() for name, row in rows.items()},
    }
