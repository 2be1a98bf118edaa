from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.sizes import format_bytes, parse_size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("12GB", 12 * 10**9),
        ("12GiB", 12 * 2**30),
        ("500MB", 500_000_000),
        ("500mib", 500 * 2**20),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("2TB", 2 * 10**12),
        ("2TiB", 2 * 2**40),
        ("1.5GB", 1_500_000_000),
        ("0.5GiB", 2**29),
        ("  8 GB ", 8 * 10**9),
        ("12g", 12 * 10**9),
        ("12G", 12 * 10**9),
        ("12 GB", 12 * 10**9),
        ("12gib", 12 * 2**30),
        ("12 GiB", 12 * 2**30),
        ("12Gi", 12 * 2**30),
        ("500m", 500_000_000),
        ("0.5t", 500_000_000_000),
        ("123", 123),
        ("123B", 123),
        (4096, 4096),
        # Products that a float puts a byte short, and a number no float holds.
        ("4.1GB", 4_100_000_000),
        ("16.9GB", 16_900_000_000),
        ("9007199254740993", 9_007_199_254_740_993),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str | int, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "-1GB",
        "1e9",
        "12 GB free",
        "12Gx",
        "g",
        "12i",
        "12 PB",
        "1,5GB",
        "1.GB",
        ".5GB",
        "0x10",
        "nan",
        "inf",
        "9" * 400,
        None,
        1.5,
        True,
        b"12GB",
        [1],
    ],
)
def test_what_is_not_a_size_is_refused_with_examples(text: Any) -> None:
    with pytest.raises(InvalidRequestError, match="is not a size; write 12GB, 12GiB, 500MB or a number of bytes"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", "0GB", "0.0001kB", 0, -5])
def test_a_size_must_be_more_than_zero(text: str | int) -> None:
    with pytest.raises(InvalidRequestError, match="must be more than zero"):
        parse_size(text)


@given(whole=st.integers(1, 10**6), tenths=st.integers(0, 999), unit=st.sampled_from(["kB", "MB", "GB", "TB"]))
def test_decimals_are_exact(whole: int, tenths: int, unit: str) -> None:
    power = {"kB": 3, "MB": 6, "GB": 9, "TB": 12}[unit]
    assert parse_size(f"{whole}.{tenths:03}{unit}") == (whole * 1000 + tenths) * 10 ** (power - 3)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (99_960, "100 kB"),
        (123_456, "123 kB"),
        (999_600, "1 MB"),
        (98_765_432, "98.8 MB"),
        (26_272_071_680, "26.3 GB"),
        (79_100_000_000, "79.1 GB"),
        (1_230_000_000_000, "1.23 TB"),
        (1.5e6, "1.5 MB"),
    ],
)
def test_bytes_are_shown_with_three_figures(count: float, text: str) -> None:
    assert format_bytes(count) == text


@given(count=st.integers(1, 999 * 10**12))
def test_what_is_shown_is_within_half_a_unit_of_the_third_figure(count: int) -> None:
    shown = parse_size(format_bytes(count))
    assert abs(Fraction(shown, count) - 1) <= Fraction(1, 199)
