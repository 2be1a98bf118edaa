"""What was published of Mixtral 8x7B's routing: arXiv 2401.04088, section 5, table 5."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["PUBLISHED", "PUBLISHED_LAYERS", "PUBLISHED_MODEL", "PublishedRepeats", "mean_published", "published_for"]

PUBLISHED_MODEL = "Mixtral 8x7B"
PUBLISHED_LAYERS = (0, 15, 31)
"""Of 32: the first, the middle and the last layer."""


class PublishedRepeats(NamedTuple):
    """Shares of consecutive tokens with the same first choice, and with a common expert, at ``PUBLISHED_LAYERS``."""

    domain: str
    first: tuple[float, float, float]
    either: tuple[float, float, float]


PUBLISHED = (
    PublishedRepeats("ArXiv", (0.140, 0.279, 0.227), (0.465, 0.623, 0.529)),
    PublishedRepeats("DM Mathematics", (0.141, 0.284, 0.197), (0.449, 0.670, 0.445)),
    PublishedRepeats("GitHub", (0.149, 0.281, 0.197), (0.499, 0.669, 0.492)),
    PublishedRepeats("Gutenberg", (0.139, 0.261, 0.263), (0.495, 0.631, 0.522)),
    PublishedRepeats("PhilPapers", (0.136, 0.253, 0.221), (0.469, 0.619, 0.513)),
    PublishedRepeats("PubMed Abstracts", (0.142, 0.246, 0.220), (0.486, 0.616, 0.518)),
    PublishedRepeats("StackExchange", (0.136, 0.272, 0.236), (0.482, 0.646, 0.536)),
    PublishedRepeats("Wikipedia (en)", (0.144, 0.236, 0.253), (0.498, 0.621, 0.518)),
)

# Names by which the same kind of text goes, in small letters without anything but letters and digits.
_ALIASES = {
    "ArXiv": ("arxiv",),
    "DM Mathematics": ("dmmathematics", "dmmath", "mathematics", "math", "maths", "arithmetic"),
    "GitHub": ("github", "code", "source", "python"),
    "Gutenberg": ("gutenberg", "pg19", "books", "novels"),
    "PhilPapers": ("philpapers", "philosophy"),
    "PubMed Abstracts": ("pubmed", "pubmedabstracts", "medicine"),
    "StackExchange": ("stackexchange", "stackoverflow"),
    "Wikipedia (en)": ("wikipedia", "wikipediaen", "enwiki", "wiki"),
}


def published_for(domain: str) -> PublishedRepeats | None:
    """The published figures for a domain of the same kind by its name; None where the paper has none."""
    key = "".join(c for c in domain.casefold() if c.isalnum())
    return next((row for row in PUBLISHED if key in _ALIASES[row.domain]), None)


def mean_published() -> PublishedRepeats:
    """The mean over the eight domains."""
    first = tuple(sum(row.first[at] for row in PUBLISHED) / len(PUBLISHED) for at in range(3))
    either = tuple(sum(row.either[at] for row in PUBLISHED) / len(PUBLISHED) for at in range(3))
    return PublishedRepeats("mean of 8", first, either)  # type: ignore[arg-type]
