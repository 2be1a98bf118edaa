"""Windows against a brute-force loop, and means against textbook formulas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mixtral import Mixtral
from mlx_mixtral.errors import ContextLengthError, InvalidRequestError
from mlx_mixtral.evaluation.corpus import Corpus, Passage, check_window, encode_texts
from mlx_mixtral.evaluation.results import Score, Tokens
from mlx_mixtral.evaluation.statistics import kl_divergence, mean_of
from mlx_mixtral.evaluation.texts import Text


def corpus(*counts: int) -> Corpus:
    """Passages in which ``counts`` tokens are predicted."""
    return Corpus(tuple(Passage(Text("d", str(n), "x"), np.arange(n + 1, dtype=np.int32), n) for n in counts), "v", "s")


def brute_force(n: int, window: int, stride: int) -> list[tuple[int, ...]]:
    """For each token from 1 on the tokens it is predicted from: those of the first window that reaches it."""
    found = []
    for token in range(1, n + 1):
        start = 0
        while token > start + window:
            start += stride
        found.append(tuple(range(start, token)))
    return found


@given(st.lists(st.integers(1, 60), min_size=1, max_size=3), st.integers(1, 25), st.data())
def test_every_token_is_predicted_once_from_the_first_window_that_reaches_it(
    counts: list[int], window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window))
    made = corpus(*counts)
    windows = made.windows(window, stride)
    seen: dict[tuple[int, int], tuple[int, ...]] = {}
    for w in windows:
        assert w.length <= window
        for token in range(w.first, w.stop + 1):
            assert (w.passage, token) not in seen
            seen[w.passage, token] = tuple(range(w.start, token))
    wanted = {
        (index, token): context
        for index, n in enumerate(counts)
        for token, context in enumerate(brute_force(n, window, stride), 1)
    }
    assert seen == wanted
    assert made.contexts(windows).tolist() == [len(wanted[key]) for key in sorted(wanted)]


def test_windows_without_overlap_are_those_of_the_definition() -> None:
    """Window i predicts tokens i W + 1 … i W + W from token i W on."""
    found = corpus(10).windows(4, 4)
    assert [(w.start, w.stop, w.first) for w in found] == [(0, 4, 1), (4, 8, 5), (8, 10, 9)]
    overlapping = corpus(10).windows(4, 2)
    assert [(w.start, w.stop, w.first) for w in overlapping] == [(0, 4, 1), (2, 6, 5), (4, 8, 7), (6, 10, 9)]


def test_the_default_window_is_the_context_or_2048() -> None:
    assert check_window(None, None, 1024) == (1024, 1024)
    assert check_window(None, None, 32768) == (2048, 2048)
    assert check_window(None, 512, 32768) == (2048, 512)
    assert check_window(4096, None, 32768) == (4096, 4096)
    with pytest.raises(ContextLengthError):
        check_window(1025, None, 1024)
    assert check_window(None, None, 32768, 512) == (512, 512)
    with pytest.raises(ContextLengthError, match="holds a KV cache for 512: reserve more"):
        check_window(513, None, 32768, 512)
    with pytest.raises(InvalidRequestError):
        check_window(True, None, 1024)


def test_tokens_are_those_of_the_whole_text_with_bos(model: Mixtral) -> None:
    texts = [Text("a", "x", "Hello there"), Text("b", "y", "Où est-ce ?")]
    made = encode_texts(model.tokenizer, texts)
    assert made.passages[0].ids.tolist() == [1, *model.tokenizer.encode("Hello there", bos=False)]
    assert [passage.nbytes for passage in made.passages] == [11, len("Où est-ce ?".encode())]
    assert made.domains == {"a": [0], "b": [1]}
    assert encode_texts(model.tokenizer, texts).sha256 == made.sha256
    assert encode_texts(model.tokenizer, texts[::-1]).sha256 != made.sha256


def test_the_standard_error_is_the_usual_one_for_few_tokens_and_that_of_blocks_for_many() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=100)
    few = mean_of(x, np.arange(100) // 64)
    assert few.value == pytest.approx(x.mean())
    assert few.stderr == pytest.approx(x.std(ddof=1) / 10)
    # Blocks of equal numbers: as many independent values as blocks.
    values = random.normal(size=50)
    many = mean_of(np.repeat(values, 64), np.repeat(np.arange(50), 64))
    assert many.stderr == pytest.approx(values.std(ddof=1) / np.sqrt(50))
    assert np.isnan(mean_of(np.ones(1), np.zeros(1, np.int64)).stderr)


def test_the_error_covers_the_truth_as_often_as_it_says() -> None:
    """Correlated tokens: 68% of means within one standard error, where independence would claim far too much."""
    random = np.random.default_rng(1)
    blocks = np.arange(4096) // 64
    inside = 0
    for _ in range(300):
        noise = np.convolve(random.normal(size=4096 + 15), np.ones(16) / 4, "valid")  # correlated over 16 tokens
        found = mean_of(noise, blocks)
        inside += abs(found.value) < found.stderr
    assert 0.58 < inside / 300 < 0.76


def test_kl_of_a_bucket_is_a_lower_bound_and_exact_with_all_tokens() -> None:
    random = np.random.default_rng(2)
    p, q = (np.log(random.dirichlet(np.ones(12), size=5)) for _ in range(2))
    exact = (np.exp(p) * (p - q)).sum(axis=1)
    nothing = np.full(5, -np.inf)
    np.testing.assert_allclose(kl_divergence(p, nothing, q, nothing), exact)
    before = np.zeros(5)
    for k in range(1, 12):
        rest = [np.log(np.exp(x[:, k:]).sum(axis=1)) for x in (p, q)]
        merged = kl_divergence(p[:, :k], rest[0], q[:, :k], rest[1])
        assert (merged >= before - 1e-12).all()
        assert (merged <= exact + 1e-12).all()
        before = merged


def test_ratio_and_its_error_are_paired() -> None:
    random = np.random.default_rng(3)
    reference = -random.exponential(3, size=500)
    logprobs = reference - 0.01 + 0.001 * random.normal(size=500)
    n = np.arange(500)
    found = Score.of(Tokens(logprobs, n // 64, n, np.zeros(500), np.ones(500, bool), reference), 1500)
    assert found.comparison is not None
    assert found.comparison.perplexity_ratio == pytest.approx(np.exp((reference - logprobs).mean()))
    # Far below the error of either perplexity: the texts' difficulty cancels.
    assert found.comparison.perplexity_ratio_stderr == pytest.approx(0.001 / np.sqrt(500), rel=0.1)
    assert found.perplexity_stderr > 1
    assert found.bits_per_byte == pytest.approx(-logprobs.sum() / np.log(2) / 1500)
