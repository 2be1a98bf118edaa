"""Text to colour by the expert each token chose first (figure 8), and colours that people tell apart."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_mixtral.evaluation.routing.record import RoutingRecord

__all__ = ["Excerpt", "domain_colour", "excerpts", "expert_colour"]

# Paul Tol's "light" scheme: backgrounds on which black text is read, distinct with any kind of colour blindness.
# https://personal.sron.nl/~pault/
EXPERTS = ("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#44BB99", "#BBCC33", "#DDDDDD")
# His "bright" scheme, for lines; a ninth domain begins again with other dashes.
DOMAINS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#999999", "#EE8866")
GOLDEN = 0.61803398875


@dataclass(frozen=True, eq=False)
class Excerpt:
    """The beginning of a domain: n tokens' texts, and their first choices uint16 ``[n, L]``."""

    domain: str
    pieces: tuple[str, ...]
    experts: npt.NDArray[np.uint16]


def excerpts(record: RoutingRecord, tokens: int) -> list[Excerpt]:
    """Up to ``tokens`` tokens of the first stretch of each domain; none where the record kept no text."""
    if record.pieces is None or tokens < 1:
        return []
    found = []
    for number, domain in enumerate(record.domains):
        first = int(np.flatnonzero(record.segments == number)[0])
        start, length = record.starts[first], min(tokens, int(record.lengths[first]))
        places = slice(start, start + length)
        found.append(Excerpt(domain, record.pieces[places], record.trace.experts[places, :, 0]))
    return found


def expert_colour(expert: int, num_experts: int) -> str:
    """A light background, ``#rrggbb``: of a scheme of eight, or spread over all hues for more experts."""
    if num_experts <= len(EXPERTS):
        return EXPERTS[expert]
    lightness = (0.72, 0.82, 0.64)[expert % 3]
    red, green, blue = colorsys.hls_to_rgb(expert * GOLDEN % 1.0, lightness, 0.65)
    return f"#{round(255 * red):02X}{round(255 * green):02X}{round(255 * blue):02X}"


def domain_colour(index: int) -> str:
    """Of the domain of this number."""
    return DOMAINS[index % len(DOMAINS)]
