"""Where the models under test are, the recorded goldens, and a fine-tune's chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest

mistral_common = pytest.importorskip("mistral_common")

DATA = Path(mistral_common.__file__).parent / "data"
MODELS = {
    "v1": DATA / "tokenizer.model.v1",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
    "tiny": Path(str(resources.files("mlx_mixtral"))) / "demo" / "tiny-mixtral" / "tokenizer.model",
}
GOLDENS = Path(__file__).parent.parent / "goldens"
CORPUS: list[str] = json.loads((GOLDENS / "tokenizer_corpus.json").read_text("utf-8"))
CONVERSATIONS = json.loads((GOLDENS / "tokenizer_chat.json").read_text("utf-8"))["conversations"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

FolderMaker = Callable[..., Path]
