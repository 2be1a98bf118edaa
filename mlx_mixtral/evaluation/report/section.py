"""The Markdown of a report, part by part, and the plots it shows: pure functions of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mlx_mixtral.evaluation.passkey import PasskeyResult
from mlx_mixtral.evaluation.plots import draw_domains, draw_long_context
from mlx_mixtral.evaluation.report.contents import PLOTS, Contents
from mlx_mixtral.evaluation.report.facts import checkpoint_part, memory_part
from mlx_mixtral.evaluation.report.markdown import escaped, fenced, image, table
from mlx_mixtral.evaluation.results import Evaluation
from mlx_mixtral.evaluation.routing.analysis import RoutingAnalysis
from mlx_mixtral.evaluation.routing.plots import draw_routing
from mlx_mixtral.evaluation.routing.repeats import repeat_tables
from mlx_mixtral.evaluation.statistics import BLOCK_TOKENS, with_error

__all__ = ["SECTION_FILE", "report_files", "section"]

SECTION_FILE = "README-section.md"
MAX_EXPERTS = 16


def report_files(contents: Contents, *, with_plots: bool = True) -> dict[str, bytes]:
    """All files of a report by their paths in its folder: ``SECTION_FILE``, and PNGs under ``plots/``.

    Raises:
        MissingDependencyError: plots are wanted and there is no matplotlib.
    """
    plots = _plots(contents) if with_plots else {}
    files = {PLOTS[name]: draw() for name, draw in plots.items()}
    return {SECTION_FILE: section(contents, set(plots)).encode(), **files}


def _plots(contents: Contents) -> dict[str, Callable[[], bytes]]:
    found = contents.evaluation
    drawn: dict[str, Callable[[], bytes]] = {
        "perplexity": lambda: draw_domains(contents.model, contents.reference, found)
    }
    buckets = found.by_length if contents.has_lengths else []
    if contents.passkeys is not None or buckets:
        drawn["long context"] = lambda: draw_long_context(contents.model, contents.passkeys, buckets)
    if (routing := contents.routing) is not None:
        drawn["routing"] = lambda: draw_routing(routing)
    return drawn


def section(contents: Contents, plots: set[str]) -> str:
    """The Markdown, headings from the second level down. ``plots`` are those of ``PLOTS`` that it may show."""
    blocks = [f"## Evaluation of {escaped(contents.model)}", *checkpoint_part(contents)]
    blocks += _perplexity(contents, "perplexity" in plots)
    blocks += _long_context(contents, "long context" in plots)
    blocks += _routing(contents, "routing" in plots)
    blocks += [*memory_part(contents), *_method(contents)]
    return "\n\n".join(blocks) + "\n"


def _perplexity(contents: Contents, with_plot: bool) -> Iterator[str]:
    found = contents.evaluation
    yield "### Perplexity"
    yield table(
        ["domain", "tokens", "bytes", "perplexity", "bits per byte"],
        [
            [
                name,
                f"{score.tokens:,}",
                f"{score.bytes:,}",
                with_error(score.perplexity, score.perplexity_stderr),
                with_error(score.bits_per_byte, score.bits_per_byte_stderr),
            ]
            for name, score in found.rows.items()
        ],
    )
    yield f"± is one standard error, over blocks of {BLOCK_TOKENS} tokens. {_windows(found)}"
    if contents.reference is not None:
        yield from _distance(contents, contents.reference)
    if with_plot:
        yield image("Perplexity by domain", PLOTS["perplexity"])


def _windows(found: Evaluation) -> str:
    apart = "" if found.stride == found.window else f" that begin {found.stride:,} apart"
    return f"Every token except BOS is predicted once, in windows of {found.window:,} tokens{apart}."


def _distance(contents: Contents, reference: str) -> Iterator[str]:
    yield f"### Distance to {escaped(reference)}"
    yield table(
        ["domain", "perplexity ratio", "mean KL", "median", "95%", "99%", "largest", "same top token"],
        [
            [
                name,
                with_error(row.perplexity_ratio, row.perplexity_ratio_stderr),
                with_error(row.kl_mean, row.kl_stderr),
                *(f"{row.kl[number]:.4f}" for number in ("50", "95", "99", "100")),
                f"{row.top1_agreement:.1%}",
            ]
            for name, score in contents.evaluation.rows.items()
            if (row := score.comparison) is not None
        ],
    )
    yield (
        "KL divergence of each next-token distribution from the reference's, in nats; tokens beyond the reference's "
        f"{contents.evaluation.top_k} likeliest count as one, which makes it a lower bound. The ratio is this model's "
        "perplexity over the reference's."
    )


def _long_context(contents: Contents, with_plot: bool) -> Iterator[str]:
    yield "### Long context"
    if (passkeys := contents.passkeys) is not None:
        yield from _passkeys(passkeys)
    elif reason := contents.left_out.get("passkeys"):
        yield escaped(reason)
    if contents.has_lengths:
        yield "Perplexity by length of context, that is, by the number of tokens from which a token is predicted:"
        yield table(
            ["tokens of context", "tokens", "perplexity"],
            [
                [
                    f"{bucket.low:,}–{bucket.high:,}",
                    f"{bucket.tokens:,}",
                    with_error(bucket.perplexity, bucket.perplexity_stderr),
                ]
                for bucket in contents.evaluation.by_length
            ],
        )
    elif reason := contents.left_out.get("by length"):
        yield escaped(reason)
    if with_plot:
        yield image("Passkeys found and perplexity by length of context", PLOTS["long context"])


def _passkeys(found: PasskeyResult) -> Iterator[str]:
    prompts = f"{found.trials} prompt{'s' * (found.trials != 1)} per cell, seed {found.seed}"
    yield (
        f"Passkey retrieval (figure 4 of the Mixtral paper): a number hidden in filler text was returned in "
        f"{found.accuracy:.0%} of all cases; {prompts}. Lengths are in tokens, prompt and answer together."
    )
    yield table(
        ["depth of the key", *(f"{length:,}" for length in found.lengths)],
        [[f"{depth:.0%}", *(f"{cells[row]:.0%}" for cells in found.found)] for row, depth in enumerate(found.depths)],
    )


def _routing(contents: Contents, with_plot: bool) -> Iterator[str]:
    yield "### Routing"
    if (found := contents.routing) is None:
        yield escaped(contents.left_out.get("routing", "Not recorded."))
        return
    yield (
        f"Which experts the routers of {found.layers} layers choose, {found.per_token} of {found.num_experts} per token, over "
        f"{found.overall.tokens:,} tokens; the paper's figures are those of Mixtral 8x7B (arXiv 2401.04088, section 5) at its "
        "layers 0, 15 and 31."
    )
    for repeats in repeat_tables(found, found.shown_layers):
        yield f"{repeats.title}:"
        yield table(repeats.columns, repeats.rows)
    yield from _shares(found)
    if with_plot:
        yield image("Shares of experts by domain and layer, repeats over layers, pairs of experts", PLOTS["routing"])


def _shares(found: RoutingAnalysis) -> Iterator[str]:
    if found.num_experts > MAX_EXPERTS:
        return
    yield (
        "Share of assignments to each expert over all texts (figure 7; uniform share "
        f"{1 / found.num_experts:.1%}), and the number of equally used experts that would have the same entropy:"
    )
    shares, effective = found.overall.shares.value, found.overall.effective_experts
    yield table(
        ["layer", *(str(expert) for expert in range(found.num_experts)), "effective"],
        [
            [str(layer), *(f"{share:.1%}" for share in shares[layer]), f"{effective[layer]:.2f}"]
            for layer in range(found.layers)
        ],
    )


def _method(contents: Contents) -> Iterator[str]:
    run = contents.run
    yield "### How this was measured"
    yield fenced(run.command, "sh")
    versions = ", ".join(f"{escaped(name)} {escaped(version)}" for name, version in run.versions.items())
    yield "\n".join(
        [
            f"- {run.date} UTC, with {versions}",
            f"- On {escaped(run.machine)}",
            f"- Text: {escaped(run.text)}",
            f"- sha256 of its token ids: `{run.text_sha256}`",
        ]
    )
