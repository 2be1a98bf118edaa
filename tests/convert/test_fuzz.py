"""A short, seeded part of ``make fuzz``, and that its guards see what they are there for."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mlx_mixtral.errors import MixtralError, NonFiniteWeightsError
from mlx_mixtral_convert import convert
from tests.fuzz.gguf_file import ARRAY, F32, STRING, U32, Key, tiny
from tests.fuzz.mutate import mutate
from tests.fuzz.run import ROOT, campaign, numbered, table
from tests.fuzz.seeds import FORMATS, make_seeds

CASES = 40
# Each is what a hostile file could make a reader do; the last line of what it prints is what the canary saw.
MISDEEDS = {
    "a command": "os.system('true')",
    "a process": "subprocess.run(['true'])",
    "code in a string": "eval('1 + 1')",
    "a pickle that imports": "pickle.loads(b'cos\\nsystem\\n.')",
    "a connection": "socket.create_connection(('127.0.0.1', 9), 1)",
    "a file beside the destination": "open(root / 'beside', 'w')",
    "a file by a path out of it": "os.open(root / 'out' / '..' / 'beside', os.O_WRONLY | os.O_CREAT)",
    "a folder beside it": "(root / 'folder').mkdir()",
    "weights outside the source": "open(root / 'source' / '..' / 'outside.safetensors')",
    "a file of the system": "open('/etc/hostname')",
}
ALLOWED = "(root / 'out' / 'model').mkdir(); (root / 'out' / 'model' / 'x').write_text('x'); (root / 'source').stat()"


def watched(folder: Path, deed: str) -> str:
    """What the canary says of ``deed``, in a process of its own: an audit hook stays for good."""
    for name in ("source", "out"):
        (folder / name).mkdir()
    (folder / "outside.safetensors").write_bytes(b"weights")
    program = f"""
import contextlib, os, pickle, socket, subprocess, sys
from pathlib import Path
from tests.fuzz.guard import Canary
root = Path(sys.argv[1])
canary = Canary(root)
with canary.watching(), contextlib.suppress(OSError):
    {deed}
print(canary.seen)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("deed", MISDEEDS.values(), ids=MISDEEDS)
def test_the_canary_sees(deed: str, tmp_path: Path) -> None:
    assert watched(tmp_path, deed) != "[]"


def test_the_canary_lets_a_conversion_do_its_work(tmp_path: Path) -> None:
    assert watched(tmp_path, ALLOWED) == "[]"


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of the address space is read from /proc")
def test_the_memory_limit_holds() -> None:
    program = "from tests.fuzz.guard import limit_memory\nlimit_memory(2**28)\ntry:\n  bytearray(2**29)\n"
    program += "except MemoryError:\n  print('refused')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "refused\n"


def test_a_case_that_ends_the_process_is_a_failure_and_the_next_one_runs() -> None:
    found = campaign([("unknown", 0), ("index", 0)], processes=1)
    assert list(found.failures) == [("unknown", 0)]
    assert found.count("index") == 1


# What the campaign found: a key of a GGUF file, another value for it, and the words of the refusal.
LIES: dict[str, tuple[Key, str]] = {
    "a negative token type": (
        Key("tokenizer.ggml.token_type", ARRAY, [2, -1] + [1] * 30, 5),
        "token_type holds a type",
    ),
    "token types of floats": (
        Key("tokenizer.ggml.token_type", ARRAY, [2.0] + [1.0] * 31, F32),
        "token_type holds a type",
    ),
    "scores of texts": (Key("tokenizer.ggml.scores", ARRAY, ["x"] * 32, STRING), "scores holds a value"),
    "scores beyond float32": (Key("tokenizer.ggml.scores", ARRAY, [1e300] * 32, 12), "scores holds a value"),
    "one number for a map": (Key("tokenizer.ggml.precompiled_charsmap", U32, 7), "precompiled_charsmap is not a list"),
    "a list for a name": (Key("tokenizer.ggml.pre", ARRAY, [1], U32), "splits text into words by"),
    "a text for a number": (Key("split.no", STRING, "x"), "split.no is 'x'"),
    "a list for a count": (Key("split.count", ARRAY, [1], U32), "split.count is"),
    "a key of two lines": (Key("llama.\x1b[2J\n", U32, 1), r"'llama.\x1b[2J\n' = 1 changes"),
}


@pytest.mark.parametrize(("key", "words"), LIES.values(), ids=LIES)
def test_keys_that_lie_about_their_type_are_refused_by_name(key: Key, words: str, tmp_path: Path) -> None:
    file = tiny("F16", vocabulary="gpt2" if key.name.endswith(".pre") else "llama")
    file.keys = [held for held in file.keys if held.name != key.name] + [key]
    (tmp_path / "m.gguf").write_bytes(file.write())
    with pytest.raises(MixtralError) as refused:
        convert(tmp_path / "m.gguf", tmp_path / "out" / "model")
    assert words in str(refused.value)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "IQ4_NL", "Q4_K", "Q6_K", "Q3_K", "IQ2_XXS"])
def test_scales_that_are_not_finite_are_refused_without_a_warning(kind: str, tmp_path: Path) -> None:
    file = tiny(kind, experts=0, hidden=256)
    blocks = next(tensor for tensor in file.tensors if tensor.name == "blk.0.attn_q.weight")
    # Infinity at every place a float16 can have in a block.
    blocks.data = b"\x00\x7c" * (len(blocks.data) // 2)
    (tmp_path / "m.gguf").write_bytes(file.write())
    with pytest.raises(NonFiniteWeightsError, match=r"attn_q\.weight"):
        convert(tmp_path / "m.gguf", tmp_path / "out" / "model")


def test_a_case_is_the_same_every_time() -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        first, second = make_seeds(Path(one)), make_seeds(Path(two))
    for fmt in FORMATS:
        for number in range(20):
            assert mutate(first[fmt], fmt, number) == mutate(second[fmt], fmt, number)


def test_mutated_files_end_in_an_error_of_ours_or_a_sound_conversion(tmp_path: Path) -> None:
    keep = Path(os.environ.get("FUZZ_KEEP", tmp_path))
    found = campaign(numbered(FORMATS, 200, CASES), processes=1, keep=keep)
    assert not found.failures, f"{table(found, FORMATS)}\n{found.failures}\nfiles: {keep}"
    for fmt in FORMATS:
        assert found.count(fmt) == CASES
        # Neither all of them refused nor all of them left as they were; a conversion takes a broken tokenizer along.
        assert 0 < found.outcomes[fmt, "valid"] < (CASES if fmt == "companion" else CASES // 2), table(found, FORMATS)
