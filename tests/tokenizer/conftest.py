"""Tokenizers under test: the real v1 and v3 that mistral-common ships, and the small one of the bundled checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_mixtral.tokenizer import Tokenizer, load_tokenizer

from .support import CHATML, MODELS, FolderMaker


@pytest.fixture
def make_folder(tmp_path: Path) -> FolderMaker:
    """Make a checkpoint folder: a tokenizer model by name ("v1", "v3", "tiny", None) and JSON or text files beside it."""

    def make(model: str | None, **files: Any) -> Path:
        folder = tmp_path / f"folder{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        if model:
            shutil.copy(MODELS[model], folder / "tokenizer.model")
        for name, content in files.items():
            if isinstance(content, str):
                (folder / f"{name}.jinja").write_text(content, "utf-8")
            else:
                (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
        return folder

    return make


@pytest.fixture
def chatml(make_folder: FolderMaker) -> Callable[..., Tokenizer]:
    """A ChatML fine-tune of the tiny model: two added tokens and a template of its own."""

    def make(template: str = CHATML, **config: Any) -> Tokenizer:
        added = {
            "4096": {"content": "<|im_start|>", "special": True},
            "4097": {"content": "<|im_end|>", "special": True},
        }
        settings = {"eos_token": "<|im_end|>", "added_tokens_decoder": added, "chat_template": template, **config}
        return load_tokenizer(make_folder("tiny", tokenizer_config=settings), vocab_size=4098)

    return make


def _load(name: str, factory: pytest.TempPathFactory) -> Tokenizer:
    folder = factory.mktemp(name)
    shutil.copy(MODELS[name], folder / "tokenizer.model")
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def v1(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return _load("v1", tmp_path_factory)


@pytest.fixture(scope="session")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return _load("v3", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return _load("tiny", tmp_path_factory)
