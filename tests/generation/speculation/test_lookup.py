"""The n-gram index against a search through the whole sequence."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlx_mixtral import SamplingParams
from mlx_mixtral.generation.sampling import Sampler
from mlx_mixtral.generation.speculation.lookup import LookupProposer, NgramIndex
from mlx_mixtral.generation.speculation.proposal import Guess

few_tokens = st.lists(st.integers(0, 3), max_size=40)


def _searched(tokens: list[int], max_ngram: int) -> tuple[int, int] | None:
    """Length of the longest suffix that occurs earlier, and where the last such occurrence goes on."""
    for n in range(min(max_ngram, len(tokens)), 0, -1):
        for at in range(len(tokens) - n - 1, -1, -1):
            if tokens[at : at + n] == tokens[-n:]:
                return n, at + n
    return None


@given(tokens=few_tokens, max_ngram=st.integers(1, 5), cut=st.integers(0, 40), count=st.integers(1, 50))
def test_the_longest_suffix_seen_before_is_continued(tokens: list[int], max_ngram: int, cut: int, count: int) -> None:
    index = NgramIndex(max_ngram)
    index.extend(tokens[:cut])
    index.extend(tokens[cut:])
    found = _searched(tokens, max_ngram)
    if found is None:
        assert (index.match, index.continuation(count)) == (0, [])
        return
    n, at = found
    copied = list(tokens)
    for offset in range(count):
        copied.append(copied[at + offset])
    assert index.match == n
    assert index.continuation(count) == copied[len(tokens) :]


def test_a_longer_match_wins_over_a_later_one() -> None:
    index = NgramIndex(3)
    index.extend([1, 2, 3, 9, 5, 3, 8, 1, 2, 3])
    assert (index.match, index.continuation(2)) == (3, [9, 5])
    shorter = NgramIndex(1)
    shorter.extend([1, 2, 3, 9, 5, 3, 8, 1, 2, 3])
    assert (shorter.match, shorter.continuation(2)) == (1, [8, 1])


def test_a_loop_goes_on_as_a_loop() -> None:
    index = NgramIndex(4)
    index.extend([7, 8, 9, 7, 8, 9, 7])
    assert index.continuation(7) == [8, 9, 7, 8, 9, 7, 8]


def test_proposals_follow_what_was_taken() -> None:
    proposer = LookupProposer([4, 5, 6, 4], 3)
    assert proposer.guess() == Guess(1, 5)
    assert proposer.propose(3, Sampler(SamplingParams(), [1], 8)).tokens.tolist() == [5, 6, 4]
    proposer.take([5])
    assert proposer.guess() == Guess(2, 6)
    proposer.take([7])
    assert proposer.guess() is None
