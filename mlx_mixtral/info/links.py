"""What one collective over each kind of link costs: published latencies, none of them measured by us.

On Metal a collective crosses from the GPU to the CPU and back, which takes 150 to 180 µs with MLX's default fence (mlx
#4438). Then each of its steps takes one trip over the link. In a ring of n machines a sum has 2 (n - 1) steps, one after
another; with jaccl all machines are cabled to each other, and their number is taken not to matter. What a token sends is a few
kilobytes, so the bandwidth of a link is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_mixtral.arguments import shown
from mlx_mixtral.errors import InvalidRequestError

__all__ = ["DEFAULT_LINK", "LINKS", "LinkSpeed", "find_link"]


@dataclass(frozen=True)
class LinkSpeed:
    """A kind of link and its latency.

    Args:
        name: as ``--link`` takes it.
        over: MLX's backend and what it runs over.
        crossing_s: paid once in a collective, whatever the number of machines.
        step_s: one step of a ring; 0 where machines send to all others at the same time.
        source: where the numbers are from.
    """

    name: str
    over: str
    crossing_s: float
    step_s: float
    source: str

    def collective_s(self, machines: int) -> float:
        """Seconds of one small sum over ``machines`` machines."""
        return self.crossing_s + 2 * (machines - 1) * self.step_s


LINKS = (
    LinkSpeed(
        "thunderbolt",
        "ring, TCP over Thunderbolt",
        150e-6,
        175e-6,
        "about 0.5 ms with 2 machines and 1.2 ms with 4: mlx #4438, mlx PR 1773, mlx-lm PR 698; 3 machines interpolated",
    ),
    LinkSpeed(
        "thunderbolt5",
        "jaccl, RDMA over Thunderbolt 5",
        200e-6,
        0.0,
        "about 0.2 ms, of which the link is less than 50 µs: mlx #4438, exo #2070",
    ),
    LinkSpeed(
        "ethernet10g",
        "ring, TCP over 10 Gb/s Ethernet",
        150e-6,
        175e-6,
        "assumed equal to TCP over Thunderbolt, which adds about 300 µs: mlx PR 1773",
    ),
    LinkSpeed(
        "wifi",
        "ring, TCP over Wi-Fi",
        150e-6,
        3675e-6,
        "round trips of 7.5 to 30 ms on average, of which this is the shortest: exo #2295",
    ),
)
DEFAULT_LINK = "thunderbolt"


def find_link(name: str | None) -> LinkSpeed:
    """The link of that name; Thunderbolt with the ring backend, which every Mac has, when none is given.

    Raises:
        InvalidRequestError: there is none.
    """
    wanted = DEFAULT_LINK if name is None else name.lower()
    for link in LINKS:
        if link.name == wanted:
            return link
    raise InvalidRequestError(f"link {shown(name)} is unknown; use one of {', '.join(link.name for link in LINKS)}")
