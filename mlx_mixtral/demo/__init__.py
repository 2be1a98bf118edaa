"""The bundled checkpoint: a real, trained Mixtral of 8.4 million parameters in Hugging Face format."""

from __future__ import annotations

from pathlib import Path

__all__ = ["checkpoint_path", "reference_path"]


def checkpoint_path() -> Path:
    """Folder of the bundled bf16 checkpoint; its README says where it comes from."""
    return Path(__file__).parent / "tiny-mixtral"


def reference_path() -> Path:
    """Logits and greedy tokens of the bundled checkpoint, recorded from transformers in float32 (npz).

    ``ids [2, 12]``, ``logits [2, 12, 4096]``, ``greedy_prompt [24]``, ``greedy_ids [40]``.
    """
    return Path(__file__).parent / "reference.npz"
