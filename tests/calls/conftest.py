"""The real v1 and v3 tokenizers, and makers of folders: those of the tokenizer's own tests."""

from __future__ import annotations

from tests.tokenizer.conftest import chatml, make_folder, tiny, v1, v3

__all__ = ["chatml", "make_folder", "tiny", "v1", "v3"]
