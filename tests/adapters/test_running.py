"""Adapters on a loaded model against what PEFT and mlx-lm compute with them: every recorded kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlx_mixtral import load
from mlx_mixtral.errors import InvalidRequestError
from tests.adapters import goldens

# The norms of experts' rows take all of their weights, wherever those lie: a conversion has them at hand.
FUSED_ONLY = ["v4-dora-experts"]


@pytest.mark.parametrize("kind", [kind for kind in goldens.kinds() if kind not in FUSED_ONLY])
def test_logits_are_those_of_who_wrote_it(kind: str, tmp_path: Path) -> None:
    base = goldens.base_folder(kind, tmp_path)
    with load(base, dtype="float32", adapter=goldens.adapter_folder(kind)) as model:
        tokens = goldens.tokens(kind)
        found = np.array(model.logits(tokens))
    np.testing.assert_allclose(found, goldens.logits(kind), atol=5e-5)


@pytest.mark.parametrize("kind", FUSED_ONLY)
def test_what_only_a_conversion_can_do_says_so(kind: str, tmp_path: Path) -> None:
    base = goldens.base_folder(kind, tmp_path)
    with pytest.raises(
        InvalidRequestError, match=r"DoRA on experts .*fuse it: mlx-mixtral convert SOURCE DEST --adapter"
    ):
        load(base, dtype="float32", adapter=goldens.adapter_folder(kind))


@pytest.mark.parametrize("kind", ["v4-bias", "v4-some-experts", "new-stacks", "mlx-dora", "v4-saved", "v4-tokens-head"])
def test_a_token_at_a_time_and_in_a_batch(kind: str, tmp_path: Path) -> None:
    """Greedy tokens follow from the logits above, from steps and rows beside the model itself too."""
    with load(goldens.base_folder(kind, tmp_path), dtype="float32", adapter=goldens.adapter_folder(kind)) as model:
        tokens, name = goldens.tokens(kind), model.adapters.in_use
        found = model.generate_batch([tokens] * 3, each=[{"adapter": None}, {}, {"adapter": name}], max_tokens=8)
        assert found[1].token_ids == found[2].token_ids == model.generate(tokens, max_tokens=8).token_ids
        sequence = list(tokens)
        for token in found[1].token_ids:
            assert int(np.array(model.logits(sequence))[-1].argmax()) == token
            sequence.append(token)
