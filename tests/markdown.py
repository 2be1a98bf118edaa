"""Markdown as a parser of it sees it: headings and tables by their text, code, and links."""

from __future__ import annotations

import re
from collections.abc import Iterator

from markdown_it import MarkdownIt
from markdown_it.token import Token

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def tables(markdown: str) -> list[list[list[str]]]:
    """Cells of all tables, header row first."""
    return [[[text_of(cell) for cell in row] for row in table] for table in _tables(markdown)]


def tables_as_written(markdown: str) -> list[list[list[str]]]:
    """As ``tables``, with code, links and emphasis as they are written."""
    return [[[cell.content for cell in row] for row in table] for table in _tables(markdown)]


def text_of(inline: Token) -> str:
    """What a reader sees, all of it plain."""
    children = inline.children or []
    assert {child.type for child in children} <= {"text", "text_special"}, inline
    return "".join(child.content for child in children)


def headings(markdown: str) -> list[str]:
    tokens = PARSER.parse(markdown)
    return [text_of(tokens[at + 1]) for at, token in enumerate(tokens) if token.type == "heading_open"]


def by_header(markdown: str, first: str) -> list[list[str]]:
    """The rows of the only table whose first column is named so."""
    (rows,) = [rows for rows in tables(markdown) if rows[0][0] == first]
    return rows


def anchors(markdown: str) -> set[str]:
    """What GitHub calls the headings in links."""
    tokens = PARSER.parse(markdown)
    titles = [tokens[at + 1] for at, token in enumerate(tokens) if token.type == "heading_open"]
    texts = ["".join(child.content for child in title.children or []) for title in titles]
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in texts}


def blocks_of_code(markdown: str) -> list[tuple[str, str]]:
    """Language and content of every block of code; an indented one has no language."""
    return [(token.info, token.content) for token in PARSER.parse(markdown) if token.type in ("fence", "code_block")]


def code_spans(markdown: str) -> list[str]:
    """Code within lines, in backticks."""
    return [child.content for child in _inline(markdown) if child.type == "code_inline"]


def links(markdown: str) -> list[str]:
    """Where links and images lead."""
    named = {"link_open": "href", "image": "src"}
    return [str(child.attrGet(named[child.type])) for child in _inline(markdown) if child.type in named]


def _inline(markdown: str) -> Iterator[Token]:
    for token in PARSER.parse(markdown):
        yield from token.children or []


def _tables(markdown: str) -> list[list[list[Token]]]:
    found: list[list[list[Token]]] = []
    for at, token in enumerate(tokens := PARSER.parse(markdown)):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append(tokens[at + 1])
    return found
