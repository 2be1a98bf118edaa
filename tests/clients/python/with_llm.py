"""The command llm with a model of its file extra-openai-models.yaml: https://pypi.org/project/llm/"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from outcomes import BASE_URL, CITY, MODEL, check

FOLDER = Path(tempfile.mkdtemp(prefix="mlx-mixtral-llm-"))
(FOLDER / "extra-openai-models.yaml").write_text(
    f"- model_id: local\n  model_name: {MODEL}\n  api_base: {BASE_URL}\n  supports_tools: true\n  supports_schema: true\n"
)


def llm(*arguments: str) -> str:
    """What the command prints."""
    program = Path(sys.executable).with_name("llm")
    environment = {**os.environ, "LLM_USER_PATH": str(FOLDER), "OPENAI_API_KEY": "none"}
    done = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def chat() -> None:
    assert llm("-m", "local", "-o", "max_tokens", "8", "--no-stream", "Hello").strip()


def stream() -> None:
    assert llm("-m", "local", "-o", "max_tokens", "8", "Hello").strip()
    assert llm("-c", "-o", "max_tokens", "8", "And then?").strip()


def tools() -> None:
    # It cannot ask that a tool be called: that the answer comes is what can be checked.
    assert llm("-m", "local", "-T", "llm_version", "-o", "max_tokens", "8", "-o", "seed", "1", "Hello").strip()


def schema() -> None:
    told = json.loads(llm("-m", "local", "--schema", "name, people int", "-o", "max_tokens", "60", CITY))
    assert isinstance(told["people"], int)


for name, carry_out in (("chat", chat), ("stream", stream), ("tools", tools), ("schema", schema)):
    check(name, carry_out)
