"""XTC and DRY on the command line: the options are the fields of ``SamplingParams``."""

from __future__ import annotations

import json
from pathlib import Path

from mlx_mixtral import SamplingParams, load

from .conftest import Invoke, assert_one_error

PROMPT = "And God said, And God said, And"
XTC = ("--xtc-probability", 0.6, "--xtc-threshold", 0.001)
DRY = ("--dry-multiplier", 2, "--dry-base", 2, "--dry-allowed-length", 1, "--dry-penalty-last-n", 20)


def test_generate_and_chat_sample_as_the_library_does(invoke: Invoke, short: Path) -> None:
    with load(short) as model:
        wanted = [
            model.generate(PROMPT, max_tokens=24, sampling=SamplingParams(0.2, seed=3, **given)).token_ids  # type: ignore[arg-type]
            for given in (
                {},
                {"xtc_probability": 0.6, "xtc_threshold": 0.001},
                {
                    "dry_multiplier": 2.0, "dry_base": 2.0, "dry_allowed_length": 1, "dry_penalty_last_n": 20,
                    "dry_sequence_breakers": ("\n", "zz"),
                },
            )
        ]  # fmt: skip
    assert len(set(wanted)) == 3
    breakers = ("--dry-sequence-breaker", r"\n", "--dry-sequence-breaker", "zz")
    for options, tokens in zip(((), XTC, (*DRY, *breakers)), wanted, strict=True):
        run = invoke("generate", short, "-p", PROMPT, "-n", 24, "-t", 0.2, "--seed", 3, "--json", *options)
        assert tuple(json.loads(run.stdout)["token_ids"]) == tokens
    assert invoke("chat", short, "-n", 3, *XTC, *DRY, input="Hello\n").exit_code == 0


def test_values_out_of_range_and_missing_tokenizers_are_one_line(invoke: Invoke, small: Path) -> None:
    for option, value in (("xtc-threshold", 0.6), ("dry-base", 0.5), ("dry-allowed-length", 0)):
        result = invoke("generate", "nowhere/at-all", "-p", "x", f"--{option}", value)
        assert_one_error(result, f"--{option} is {value}")
        assert result.exit_code == 2
    ids = ("generate", small, "--token-ids", "5,6", "-n", 2, "--dry-multiplier", 1)
    assert_one_error(invoke(*ids), "dry_sequence_breakers are texts: give none")
    assert invoke(*ids, "--dry-sequence-breaker", "none").exit_code == 0
