"""``generate``: the text is the library's, results go to stdout alone, bad input is one line before anything is loaded."""

from __future__ import annotations

import json
import signal
import struct
import time
from pathlib import Path

import pytest

from mlx_mixtral import SamplingParams, load
from mlx_mixtral.cli.console import terminal_safe

from .conftest import SAYS_IT_BEGAN, SLOW_READS, SLOW_TOKENS, TOUCHES, Invoke, Spawn, assert_one_error
from .terminal import CTRL_C, Terminal

PROMPT = "And it came to pass,"


def test_text_is_what_the_library_generates(invoke: Invoke, quantised: Path) -> None:
    with load(quantised) as model:
        greedy = model.generate(PROMPT, max_tokens=12)
        sampling = SamplingParams(temperature=0.9, top_p=0.8, top_k=50, min_p=0.01, repetition_penalty=1.2, seed=4)
        sampled = model.generate(PROMPT, max_tokens=12, sampling=sampling)
    result = invoke("generate", quantised, "-p", PROMPT, "-n", 12)
    assert (result.exit_code, result.stdout) == (0, greedy.text + "\n")
    values = {"temperature": 0.9, "top-p": 0.8, "top-k": 50, "min-p": 0.01, "repetition-penalty": 1.2, "seed": 4}
    flags = [f"--{name}={value}" for name, value in values.items()]
    assert invoke("generate", quantised, "-p", PROMPT, "-n", 12, *flags).stdout == sampled.text + "\n"
    assert greedy.text != sampled.text


def test_stats_are_one_line_on_stderr_and_can_be_left_out(invoke: Invoke, quantised: Path) -> None:
    shown = invoke("generate", quantised, "-p", PROMPT, "-n", 5).stderr
    assert len(shown.splitlines()) == 1
    assert "5 tokens" in shown
    # Neither prompt nor answer has the tokens that a rate needs.
    assert "tok/s" not in shown
    shown = invoke("generate", quantised, "-p", PROMPT, "-n", 30).stderr
    assert shown.count("tok/s") == 1
    assert "peak memory" in shown
    assert invoke("generate", quantised, "-p", PROMPT, "-n", 5, "--no-stats").stderr == ""


def test_json_has_text_ids_reason_and_stats_and_nothing_on_stderr(invoke: Invoke, quantised: Path) -> None:
    result = invoke("generate", quantised, "-p", PROMPT, "-n", 6, "--json")
    answer = json.loads(result.stdout)
    with load(quantised) as model:
        wanted = model.generate(PROMPT, max_tokens=6)
        prompt_tokens = len(model.tokenizer.encode(PROMPT))
    assert (answer["text"], tuple(answer["token_ids"])) == (wanted.text, wanted.token_ids)
    assert answer["finish_reason"] == "length"
    assert answer["stats"]["prompt_tokens"] == prompt_tokens
    assert answer["stats"]["tokens"] == 6
    assert {"time_to_first_token_s", "prompt_tok_s", "decode_tok_s", "peak_memory_bytes"} <= answer["stats"].keys()
    assert "logprobs" not in answer
    assert result.stderr == ""


def test_logprobs_come_with_the_likeliest_tokens(invoke: Invoke, quantised: Path) -> None:
    answer = json.loads(invoke("generate", quantised, "-p", PROMPT, "-n", 3, "--json", "--logprobs", 2).stdout)
    assert [entry["token_id"] for entry in answer["logprobs"]] == answer["token_ids"]
    for entry in answer["logprobs"]:
        # Greedy: the chosen token is the likeliest one.
        assert entry["top"][0] == {"token_id": entry["token_id"], "logprob": entry["logprob"]}
        assert entry["top"][1]["logprob"] <= entry["logprob"] < 0
    assert invoke("generate", quantised, "-p", PROMPT, "--logprobs", 2).exit_code == 2


def test_stop_strings_stop_ids_and_bias_reach_the_loop(invoke: Invoke, quantised: Path) -> None:
    free = json.loads(invoke("generate", quantised, "-p", PROMPT, "-n", 12, "--json").stdout)
    word = free["text"].split()[3]
    cut = json.loads(invoke("generate", quantised, "-p", PROMPT, "-n", 12, "--stop", word, "--json").stdout)
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == free["text"][: free["text"].index(word)]
    third = free["token_ids"][2]
    by_id = json.loads(invoke("generate", quantised, "-p", PROMPT, "--stop-token-id", third, "--json").stdout)
    assert by_id["token_ids"] == free["token_ids"][: free["token_ids"].index(third) + 1]
    bias = f"{free['token_ids'][0]}=-100"
    biased = json.loads(invoke("generate", quantised, "-p", PROMPT, "-n", 1, "--logit-bias", bias, "--json").stdout)
    assert biased["token_ids"] != free["token_ids"][:1]


def test_prompt_from_standard_input_is_the_same_prompt(invoke: Invoke, quantised: Path) -> None:
    piped = invoke("generate", quantised, "-p", "-", "-n", 8, input="Dieu se souvint de Noé".encode())
    assert piped.stdout == invoke("generate", quantised, "-p", "Dieu se souvint de Noé", "-n", 8).stdout


def test_standard_input_that_is_not_utf8_names_the_byte(invoke: Invoke, quantised: Path) -> None:
    result = invoke("generate", quantised, "-p", "-", input="Noé".encode("latin-1"))
    assert_one_error(result, "0xe9", "offset 2")


def test_token_ids_work_without_a_tokenizer_and_text_says_why_not(invoke: Invoke, without_tokenizer: Path) -> None:
    answer = json.loads(invoke("generate", without_tokenizer, "--token-ids", "1,497,832", "-n", 4, "--json").stdout)
    assert len(answer["token_ids"]) == 4
    shown = invoke("generate", without_tokenizer, "--token-ids", "1 497 832", "-n", 4)
    assert shown.stdout == " ".join(map(str, answer["token_ids"])) + "\n"
    assert_one_error(invoke("generate", without_tokenizer, "-p", "Hi"), "tokenizer")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--temperature", "-0.1"], "--temperature is -0.1"),
        (["--top-p", "1.5"], "--top-p is 1.5"),
        (["--max-tokens", "0"], "--max-tokens is 0"),
        (["--top-k", "-1"], "--top-k is -1"),
        (["--min-p", "2"], "--min-p is 2"),
        (["--repetition-penalty", "0"], "--repetition-penalty is 0"),
        (["--stop", ""], "stop string ''"),
        (["--logprobs", "101", "--json"], "logprobs is 101"),
        (["--prompt", ""], "prompt is empty"),
    ],
)
def test_values_out_of_range_are_refused_before_the_model_is_looked_for(
    invoke: Invoke, flags: list[str], named: str
) -> None:
    result = invoke("generate", "no-such-folder", "-p", PROMPT, *flags)
    assert_one_error(result, named)
    assert result.exit_code == 2


@pytest.mark.parametrize(
    "flags",
    [
        ["-p", "x", "--top-k", "abc"],
        ["-p", "x", "--logit-bias", "abc"],
        ["--token-ids", "1,x"],
        ["-p", "x", "--token-ids", "1"],
        [],
        ["-p", "x", "--dtype", "int8"],
    ],
)
def test_malformed_options_are_usage_errors(invoke: Invoke, flags: list[str]) -> None:
    assert invoke("generate", "no-such-folder", *flags).exit_code == 2


def test_bad_models_are_one_line(invoke: Invoke, tmp_path: Path, checkpoint_copy: Path) -> None:
    assert_one_error(invoke("generate", tmp_path / "absent", "-p", "x"), "absent", "no such folder")
    assert_one_error(invoke("generate", checkpoint_copy, "--token-ids", "1,4096"), "4096", "0 to 4095")
    assert_one_error(invoke("generate", checkpoint_copy, "-p", "x", "--context", "5000"), "1024")
    assert_one_error(invoke("generate", checkpoint_copy, "-p", "x " * 1100), "context", "1024")


def test_truncated_weights_are_one_line(invoke: Invoke, checkpoint_copy: Path) -> None:
    weights = checkpoint_copy / "model.safetensors"
    data = weights.read_bytes()
    for kept in (4, 100, len(data) - 1000):
        weights.write_bytes(data[:kept])
        assert_one_error(invoke("generate", checkpoint_copy, "-p", "x"), "model.safetensors")
    weights.write_bytes(struct.pack("<Q", 2**40) + data[8:])
    assert_one_error(invoke("generate", checkpoint_copy, "-p", "x"), "header")


def test_names_from_a_checkpoint_cannot_steer_the_terminal(invoke: Invoke, checkpoint_copy: Path) -> None:
    config = checkpoint_copy / "config.json"
    config.write_text(config.read_text().replace('"mixtral"', '"\\u001b[2Jevil\\nerror: fake"'))
    result = invoke("generate", checkpoint_copy, "-p", "x")
    assert_one_error(result)
    assert "\x1b" not in result.stderr
    assert (
        terminal_safe("a\x1b[2J\tb\nc\x07\x9b")
        == "a\N{REPLACEMENT CHARACTER}[2J\tb\nc" + 2 * "\N{REPLACEMENT CHARACTER}"
    )


def test_ctrl_c_while_generating_keeps_the_text_so_far(spawn: Spawn, tiny: Path) -> None:
    process = spawn("generate", tiny, "-p", PROMPT, "-n", 1000, "--logit-bias", "2=-100", before=SLOW_TOKENS)
    assert process.stdout is not None
    begun = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    text = (begun + out).decode()
    assert process.returncode == 130
    assert err == b"interrupted\n"
    assert text.endswith("\n")
    shown = text.removesuffix("\n")
    with load(tiny) as model:
        beginning = model.generate(PROMPT, max_tokens=60, sampling=SamplingParams(logit_bias={2: -100})).text
    assert beginning.startswith(shown) or shown.startswith(beginning)
    assert len(shown) < 2500, "1000 tokens were generated: nothing was interrupted"


def test_ctrl_c_at_a_terminal_loses_nothing_that_was_not_read_yet(spawn: Spawn, tiny: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    flags = ("-p", PROMPT, "-n", 1000, "--logit-bias", "2=-100")
    # More is on its way than a terminal takes from a program while nobody reads.
    slowly = 'print("-" * 6000, flush=True)\n' + SLOW_TOKENS + TOUCHES.format(str(begun))
    screen = Terminal(spawn, tmp_path, tiny, *flags, before=slowly, command="generate")
    while not begun.exists():
        assert screen.process.poll() is None
        time.sleep(0.02)
    screen.type(CTRL_C)
    assert screen.end() == 130
    with load(tiny) as model:
        beginning = model.generate(PROMPT, max_tokens=20, sampling=SamplingParams(logit_bias={2: -100})).text
    assert beginning in screen.text


def test_ctrl_c_keeps_the_text_of_the_json_result_too(spawn: Spawn, tiny: Path) -> None:
    flags = ("-n", 1000, "--json", "--logit-bias", "2=-100")
    process = spawn("generate", tiny, "-p", PROMPT, *flags, before=SLOW_TOKENS + SAYS_IT_BEGAN)
    assert process.stderr is not None
    assert process.stderr.readline() == b"begun\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"interrupted\n")
    result = json.loads(out)
    assert result["finish_reason"] == "cancelled"
    assert 0 < len(result["token_ids"]) < 1000
    with load(tiny) as model:
        sampling = SamplingParams(logit_bias={2: -100})
        alone = model.generate(PROMPT, max_tokens=len(result["token_ids"]), sampling=sampling)
    assert result["text"] == alone.text


@pytest.mark.parametrize("count", [40, 9])
def test_a_saved_prompt_is_continued_as_it_is(invoke: Invoke, short: Path, tmp_path: Path, count: int) -> None:
    saved, ids = tmp_path / "prompt", ",".join(map(str, range(1, count + 1)))
    assert invoke("generate", short, "--token-ids", ids, "-n", 1, "--save-prompt", saved).exit_code == 0
    result = invoke("generate", short, "--from-prompt", saved, "-n", 6, "--json")
    assert result.exit_code == 0, result.stderr
    whole = invoke("generate", short, "--token-ids", ids, "-n", 6, "--json")
    found, expected = json.loads(result.stdout), json.loads(whole.stdout)
    assert found["token_ids"] == expected["token_ids"]
    stats = found["stats"]
    assert stats["prompt_tokens"] == count
    line = " ".join(invoke("generate", short, "--from-prompt", saved, "-n", 6).stderr.split())
    if count == 40:
        assert count - 2 <= stats["reused_tokens"] < count
        assert stats["not_reused"] is None
        assert f"({stats['reused_tokens']} known)" in line
    else:
        assert stats["reused_tokens"] == 0
        assert "and fewer than 16 are computed again" in stats["not_reused"]
        assert f"(none known: {stats['not_reused']})" in line
    assert invoke("generate", short).exit_code == 2


def test_ctrl_c_while_loading_is_one_line(spawn: Spawn, tiny: Path) -> None:
    process = spawn("generate", tiny, "-p", PROMPT, before=SLOW_READS)
    assert process.stderr is not None
    assert process.stderr.readline() == b"reading\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == b""
    assert err.replace(b"reading\n", b"") == b"interrupted\n"


def test_a_seed_that_is_no_integer_is_refused_before_the_model_is_loaded(invoke: Invoke) -> None:
    result = invoke("generate", "nowhere", "-p", "x", "--seed", "abc")
    assert result.exit_code == 2
    assert result.stderr == "error: --seed is 'abc'; it must be an integer\n"


def test_control_tokens_of_the_prompt_are_counted_and_can_be_text(invoke: Invoke, quantised: Path) -> None:
    def tokens(*flags: str) -> tuple[int, int]:
        stats = json.loads(invoke("generate", quantised, "-p", "Hello</s>", "-n", 1, "--json", *flags).stdout)["stats"]
        return stats["prompt_tokens"], stats["prompt_special_tokens"]

    with load(quantised) as model:
        hello, as_text = (len(model.tokenizer.encode(text)) for text in ("Hello", "Hello</s>"))
    assert tokens() == (hello + 1, 1)
    assert tokens("--no-special") == (as_text, 0)
    line = invoke("generate", quantised, "-p", "Hello</s>", "-n", 1).stderr
    assert line.startswith(f"{hello + 1} prompt tokens (1 special) · ")


def test_the_rest_of_a_saved_prompt_has_its_control_tokens_too(invoke: Invoke, quantised: Path, tmp_path: Path) -> None:
    saved = tmp_path / "one.prompt"
    assert invoke("generate", quantised, "-p", "Hello", "-n", 1, "--save-prompt", saved).exit_code == 0
    further = ("generate", quantised, "-p", "</s><s>", "-n", 1, "--saved-prompt", saved, "--json")
    stats, as_text = (json.loads(invoke(*further, *flags).stdout)["stats"] for flags in ((), ("--no-special",)))
    assert (stats["prompt_special_tokens"], as_text["prompt_special_tokens"]) == (2, 0)
    assert stats["prompt_tokens"] < as_text["prompt_tokens"]


def test_tokenizers_that_disagree_are_noted_once_and_chosen_between(invoke: Invoke, checkpoint_copy: Path) -> None:
    spec = {"model": {"type": "BPE", "vocab": {"<unk>": 0, "<s>": 1, "</end>": 2}, "merges": []}}
    (checkpoint_copy / "tokenizer.json").write_text(json.dumps(spec))
    noted = invoke("generate", checkpoint_copy, "-p", "Hello", "-n", 1)
    assert noted.exit_code == 0
    lines = [line for line in noted.stderr.splitlines() if line.startswith("note: ")]
    assert len(lines) == 1
    assert "id 2 is '</s>' in the first and '</end>' in the second" in lines[0]
    chosen = invoke("generate", checkpoint_copy, "-p", "Hello", "-n", 1, "--tokenizer", "model")
    assert (chosen.stdout, "note: " in chosen.stderr) == (noted.stdout, False)
    assert_one_error(invoke("generate", checkpoint_copy, "-p", "Hi", "--tokenizer", "json"), "tokenizer.json")
    shown = invoke("info", checkpoint_copy).stdout
    assert "chat format mistral-v1 (a guess), stops at 2" in shown
    assert "note: tokenizer.model and tokenizer.json disagree" in " ".join(shown.split())


def test_a_chat_template_that_is_not_there_is_refused_before_the_model_is_looked_for(invoke: Invoke) -> None:
    for command in (("generate", "no-such-folder", "-p", PROMPT), ("chat", "no-such-folder")):
        assert_one_error(invoke(*command, "--chat-template", "chatmll"), "'chatmll'", "chatml")
