"""Every example runs top to bottom on the bundled checkpoint and prints what it is about."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests.forks import run_python
from tests.processes import PYTHONPATH
from tests.server.conftest import running

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: object) -> str:
    """As ``python examples/NAME arguments…`` does, warnings being errors."""
    code = f"""
import runpy, sys, warnings
sys.argv[0] = {str(EXAMPLES / name)!r}
warnings.simplefilter("error")
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    done = run_python(code, list(map(str, arguments)), {**os.environ, "PYTHONPATH": PYTHONPATH})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_generate_is_repeatable_and_greedy_differs_from_sampled() -> None:
    first, second = run("generate.py", Path("mlx_mixtral/demo/tiny-mixtral").absolute()), run("generate.py")
    assert first.splitlines()[:2] == second.splitlines()[:2]
    greedy, sampled, figures = first.splitlines()[0], first.splitlines()[1], first.splitlines()[-1]
    assert greedy.startswith("In the beginning ")
    assert sampled.startswith("In the beginning")
    assert greedy != sampled
    assert re.fullmatch(r"\d+ tokens, [\d.]+ tok/s, ended by (length|stop)", figures)


def test_stream_continues_the_prompt() -> None:
    text, figures = run("stream.py", EXAMPLES.parent / "mlx_mixtral/demo/tiny-mixtral", "In the beginning").splitlines()
    assert text.startswith("In the beginning")
    assert len(text) > len("In the beginning") + 5
    assert re.fullmatch(r"\d+ tokens, [\d.]+ nats each", figures)


def test_chat_holds_two_turns() -> None:
    shown = run("chat.py")
    assert shown.count("user: ") == shown.count("assistant: ") == 2
    assert re.search(r"\d+ tokens before the last answer", shown)


def test_convert_follows_its_recipe(tmp_path: Path) -> None:
    shown = run("convert.py", ROOT / "mlx_mixtral" / "demo" / "tiny-mixtral", tmp_path / "out")
    assert re.search(r"attention +8\.50 bits", shown)
    assert re.search(r"expert +3\.50 bits", shown)
    assert re.search(r"router +16\.00 bits", shown)
    assert (tmp_path / "out" / "conversion.json").is_file()


def test_a_batch_gives_each_prompt_the_text_it_has_alone() -> None:
    folder = ROOT / "mlx_mixtral" / "demo" / "tiny-mixtral"
    together = sorted(run("batch.py", folder, "In the beginning", "Am Anfang", "Au commencement").splitlines())
    alone = [run("batch.py", folder, prompt).strip() for prompt in ("In the beginning", "Am Anfang", "Au commencement")]
    assert [line.partition(": ")[2] for line in together] == [line.partition(": ")[2] for line in alone]
    assert [line[0] for line in together] == ["0", "1", "2"]


def test_two_requests_take_turns_and_one_is_cancelled() -> None:
    lines = run("asyncio_two_requests.py").splitlines()
    assert any(re.match(r"first \(\d+ tokens, (length|stop)\): And God said .+", line) for line in lines)
    assert any(re.match(r"second \(10 tokens, cancelled\): Au commencement.+", line) for line in lines)


def test_perplexity_table_has_a_row_a_model_and_a_column_a_domain(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("And it came to pass in those days")
    (tmp_path / "code.txt").write_text("def f(x):\n    return x\n")
    arguments = ("--text", tmp_path, "--only", "2 bits", "experts-4bit")
    head, rule, *rows = (line.strip("|").split("|") for line in run("perplexity_table.py", *arguments).splitlines())
    assert [name.strip() for name in head[2:5]] == ["code", "en", "all"]
    assert len(rule) == len(head) == 7
    assert [row[0].strip() for row in rows] == ["source", "2 bits", "experts-4bit"]
    perplexities = [float(row[4]) for row in rows]
    assert perplexities[0] < perplexities[2] < perplexities[1]
    assert 0 == float(rows[0][5]) < float(rows[2][5]) < float(rows[1][5])


def test_the_openai_package_asks_a_server() -> None:
    pytest.importorskip("openai")
    with running(ROOT / "mlx_mixtral" / "demo" / "tiny-mixtral") as server:
        *streamed, city, call, figures = run("openai_client.py", f"{server.url}/v1").splitlines()
    assert "".join(streamed).strip()
    assert re.fullmatch(r"city: .{0,20}", city)
    assert set(json.loads(call.removeprefix("call: weather "))) == {"city"}
    assert re.fullmatch(r"\d+ \+ \d+ tokens", figures)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short_and_public(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert 20 <= len(source.splitlines()) <= 50
    imported = re.findall(r"from (mlx_mixtral[\w.]*) import|import (mlx_mixtral[\w.]*)", source)
    assert {a or b for a, b in imported} <= {"mlx_mixtral", "mlx_mixtral.demo", "mlx_mixtral_convert"}
