"""What the readers find in adapters of PEFT and mlx-lm, against the logits that those compute with them."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_mixtral.adapters.opening import open_adapter
from mlx_mixtral.config.mixtral import MixtralConfig

from .goldens import BASES, adapter_folder, base_name, base_tensors, kinds, logits, tokens
from .naive import adapted, forward

LIMIT = 5e-5


@pytest.mark.parametrize("kind", kinds())
def test_an_adapter_means_what_its_writer_computes(kind: str) -> None:
    base = BASES[base_name(kind)]
    config, tensors = MixtralConfig.from_hf(base), base_tensors(base_name(kind))
    adapter = open_adapter(adapter_folder(kind), config)
    assert adapter.kind == ("mlx-lm" if kind.startswith("mlx-") else "PEFT")
    found = forward(base, *adapted(adapter, config, tensors), tokens(kind))
    assert np.abs(found - logits(kind)).max() < LIMIT
    adapter.close()


def test_there_is_a_golden_of_every_kind() -> None:
    assert len(kinds()) == 39
