"""Markdown as a parser of it sees it: headings and tables by their text."""

from __future__ import annotations

from markdown_it import MarkdownIt
from markdown_it.token import Token

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def tables(markdown: str) -> list[list[list[str]]]:
    """Cells of all tables, header row first."""
    found: list[list[list[str]]] = []
    for at, token in enumerate(tokens := PARSER.parse(markdown)):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append(text_of(tokens[at + 1]))
    return found


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
