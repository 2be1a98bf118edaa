"""What a token costs on several machines: the one formula behind ``info --machines`` and the split "auto". Arithmetic only.

Seconds of a token, where A, H and E are the bytes it reads of attention with routers and norms, of the head, and of its
experts, B the bytes a second that a machine reads, n machines, L layers, s the largest share of the experts (1/n of equal
machines), c one small sum over all machines:

    one machine   (A + H + E) / B
    layers        (A + H + E) / B + (n + 1) c
    experts       (A + H + s E) / B + (L + 1) c

The sum that both have beside theirs tells the other machines the token (``distributed.link``). With ``layers`` a state goes on
to the next machine as a sum over all of them (``model.stages``).
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_mixtral.distributed.shares import Split

__all__ = ["TokenBytes", "sums_per_token"]


def sums_per_token(split: Split, machines: int, layers: int) -> int:
    """Sums over all machines that one decode step waits for."""
    return 1 + (layers if split == "experts" else machines)


@dataclass(frozen=True)
class TokenBytes:
    """Bytes of weights that one token reads.

    Args:
        shared: attention, routers, norms and the head.
        experts: the chosen experts of all layers.
    """

    shared: int
    experts: int

    def one_machine_s(self, bytes_per_s: float) -> float:
        """Seconds of a token on one machine that holds everything."""
        return (self.shared + self.experts) / bytes_per_s

    def layers_s(self, bytes_per_s: float, sum_s: float, machines: int) -> float:
        """Seconds of a token with layers split: everything is read in turn."""
        return self.one_machine_s(bytes_per_s) + sums_per_token("layers", machines, 0) * sum_s

    def experts_s(self, bytes_per_s: float, sum_s: float, layers: int, largest: float) -> float:
        """Seconds of a token with experts split, of which a machine holds ``largest``, from 0 to 1, at most."""
        return (self.shared + self.experts * largest) / bytes_per_s + sums_per_token("experts", 0, layers) * sum_s
