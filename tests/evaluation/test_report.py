"""The Markdown of a report, read by a Markdown parser: names stay text, tables are tables, fences hold."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mixtral.evaluation.passkey import PasskeyResult
from mlx_mixtral.evaluation.report.contents import Contents, Run
from mlx_mixtral.evaluation.report.markdown import escaped, fenced, table
from mlx_mixtral.evaluation.report.section import section
from mlx_mixtral.evaluation.results import Comparison, Evaluation, LengthBucket, Score
from tests.markdown import PARSER, by_header, headings, tables

NASTY = "a|b *c* _d_ `e` [f](g) <i>h</i> &lt; $x$ ~~y~~ ![z](w) \\| # "


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
def test_any_text_is_shown_as_it_is_in_headings_and_cells(text: str) -> None:
    shown = "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))
    assert headings(f"## of {escaped(text)}") == [f"of {shown}".strip()]
    assert tables(table(["x", text], [[text, "y"]])) == [[["x", shown], [shown, "y"]]]


@given(st.text("`a\n ", max_size=20))
def test_a_fence_holds_whatever_backticks_are_in_it(text: str) -> None:
    (token,) = PARSER.parse(f"{fenced(text, 'sh')}\n")
    assert (token.type, token.info, token.content) == ("fence", "sh", f"{text}\n")


SCORE = Score(
    1000, 4000, 12.25, 0.5, 0.9034, 0.02,
    Comparison(0.0421, 0.0017, {"50": 0.01, "90": 0.02, "95": 0.03, "99": 0.2, "100": 1.5}, 0.911, 0.01, 12.0, 1.0208, 0.004),
)  # fmt: skip
BUCKETS = [LengthBucket(1, 32, 500, 20.0, 1.0), LengthBucket(33, 64, 500, 9.0, math.nan)]
EVALUATION = Evaluation({}, {}, {}, [], 64, 64, 1.0, 1.0)  # type: ignore[arg-type]
FACTS: dict[str, Any] = {
    "architecture": "mixtral", "parameters": 1000, "active_parameters": 500, "layers": 2, "experts": 4,
    "experts_per_token": 2, "hidden_size": 8, "vocab_size": 64, "context": 64, "bytes": 2000, "bits_per_weight": 16.0,
    "bytes_per_token": 1000, "conversion": None,
    "kv_cache": {"bytes_per_token": 512, "bytes_by_context": {"64": 32768}},
    "parts": [{"part": "experts", "formats": ["4-bit g64"], "parameters": 1000, "bits_per_weight": 16.0, "bytes": 2000}],
    "fits": [
        {"memory_gib": 16, "usable_bytes": 11, "context": {"this model": 0}},
        {"memory_gib": 32, "usable_bytes": 22, "context": {"this model": 40}},
        {"memory_gib": 64, "usable_bytes": 51, "context": {"this model": 64}},
        {"memory_gib": 96, "usable_bytes": 77, "context": {"this model": 64}},
    ],
}  # fmt: skip


def contents(**changes: Any) -> Contents:
    found = replace(EVALUATION, overall=SCORE, domains={NASTY: SCORE, "de": SCORE}, by_length=BUCKETS, top_k=128)
    run = Run("mlx-mixtral report 'a`b'", "2026-11-26 11:29", {"mlx": "0.32"}, "a CPU", "2 texts", "ab" * 32)
    return replace(Contents(NASTY, FACTS, found, run), **changes)


def test_names_of_models_domains_and_references_stay_text() -> None:
    markdown = section(contents(reference=NASTY), {"perplexity"})
    shown = " ".join(NASTY.split())
    assert headings(markdown)[0] == f"Evaluation of {shown}"
    assert f"Distance to {shown}" in headings(markdown)
    perplexity, distance = (rows for rows in tables(markdown) if rows[0][0] == "domain")
    assert [row[0] for row in perplexity] == [row[0] for row in distance] == ["domain", shown, "de", "all"]
    assert perplexity[1][1:] == ["1,000", "4,000", "12.25 ± 0.50", "0.903 ± 0.020"]
    assert distance[1][1:] == ["1.0208 ± 0.0040", "0.0421 ± 0.0017", "0.0100", "0.0300", "0.2000", "1.5000", "91.1%"]
    assert not [token for token in PARSER.parse(markdown) if token.type == "html_block"]


def test_every_row_is_as_long_as_its_header() -> None:
    passkeys = PasskeyResult((512, 1024), (0.0, 1.0), ((1.0, 0.5), (0.25, 0.0)), 4, 7)
    markdown = section(contents(passkeys=passkeys, reference="x"), set())
    assert len(tables(markdown)) == 6
    for rows in tables(markdown):
        assert len(rows) > 1
        assert {len(row) for row in rows} == {len(rows[0])}
    assert by_header(markdown, "depth of the key")[1:] == [["0%", "100%", "25%"], ["100%", "50%", "0%"]]
    assert "44% of all cases; 4 prompts per cell, seed 7" in markdown
    assert by_header(markdown, "tokens of context")[1:] == [["1–32", "500", "20.0 ± 1.0"], ["33–64", "500", "9"]]


def test_memory_ends_with_the_first_mac_that_holds_the_whole_context() -> None:
    assert [row[::2] for row in by_header(section(contents(), set()), "Mac's memory")[1:]] == [
        ["16 GB", "experts streamed from disk"],
        ["32 GB", "40"],
        ["64 GB and more", "64"],
    ]


def test_parts_that_are_missing_say_why_and_plots_are_shown_only_if_drawn() -> None:
    short = replace(contents().evaluation, by_length=BUCKETS[:1])
    left_out = {"passkeys": "No room for *keys*.", "by length": "Too short.", "routing": "It is dense."}
    markdown = section(contents(evaluation=short, left_out=left_out), set())
    for reason in (r"No room for \*keys\*.", "Too short.", "It is dense."):
        assert markdown.count(reason) == 1
    assert "![" not in markdown
    assert "tokens of context" not in markdown
    assert "](plots/perplexity.png)" in section(contents(), {"perplexity"})


def test_a_conversion_tells_source_recipe_and_worst_tensors() -> None:
    errors = {f"model.layers.{n}.o_proj": {"spec": "4-bit g64", "relative_rms": n / 100, "worst": 1} for n in range(9)}
    conversion = {
        "source": {"name": "org/model_1", "revision": "abc"},
        "recipe": {
            "bits": 4, "group_size": 64, "mode": "affine", "rounding": "gptq", "calibration": "0123456789abcdef",
            "overrides": {"*.o_proj": {"bits": 6, "group_size": 32}, "lm_head": False},
        },
        "dtype": "float16", "converter": {"name": "mlx-mixtral", "version": "0.1.0"}, "errors": errors,
    }  # fmt: skip
    markdown = section(contents(facts=FACTS | {"conversion": conversion}), set())
    assert "- Source: org/model\\_1, revision abc\n" in markdown
    assert (
        "- Recipe: 4 bits in groups of 64, rounded by gptq, with a calibration (sha256 0123456789ab…); otherwise "
        "\\*.o\\_proj: 6 bits in groups of 32, lm\\_head: not quantised; scales, norms and unquantised weights in float16\n"
    ) in markdown
    worst = by_header(markdown, "tensor")
    assert [row[0] for row in worst[1:]] == [f"layers.{n}.o_proj" for n in (8, 7, 6, 5, 4)]
    assert worst[1] == ["layers.8.o_proj", "4-bit g64", "8.00%"]
    assert "There is no conversion.json" in section(contents(), set())


@pytest.mark.parametrize(
    "conversion",
    [[], {"source": 1, "recipe": [], "errors": {"x": 3}}, {"errors": {"x": {"relative_rms": "much"}}, "converter": 5}],
)
def test_a_strange_conversion_json_is_no_reason_to_fail(conversion: object) -> None:
    assert "tensor" not in section(contents(facts=FACTS | {"conversion": conversion}), set())
