"""``--adapter`` on the command line: the library's text, results that name it, saved prompts that know it, errors of a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import Mixtral, SamplingParams, load
from mlx_mixtral.bench.backend import Ours
from mlx_mixtral.bench.mlx_lm_backend import MlxLm
from mlx_mixtral.bench.traffic import TokenTraffic
from mlx_mixtral.evaluation.perplexity import evaluate
from mlx_mixtral.evaluation.texts import read_texts
from mlx_mixtral.generation.request import Request
from mlx_mixtral.generation.scheduler import Scheduler
from mlx_mixtral.hub import Source
from mlx_mixtral.machine.bandwidth import copy_rates
from tests.adapters.made import lora
from tests.distributed.launching import ended, ranks
from tests.shared import SharedFolders

from .conftest import Invoke, assert_one_error

TASKS = Path(__file__).parents[1] / "evaluation" / "harness" / "tasks"
PARTS = ("attention", "expert")
PROMPT = "The quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def one(short: Path, shared: SharedFolders) -> Path:
    return shared("command-line adapter 1", lambda folder: lora(folder, short, seed=1, rank=2, parts=PARTS, size=0.2))


@pytest.fixture(scope="module")
def two(short: Path, shared: SharedFolders) -> Path:
    """One with something to be said of it."""

    def make(folder: Path) -> None:
        config = lora(folder, short, seed=2, rank=2, parts=PARTS, size=0.2) / "adapter_config.json"
        config.write_text(config.read_text().replace('"dropout": 0.0', '"dropout": 0.1'))

    return shared("command-line adapter 2", make)


def generated(invoke: Invoke, *arguments: object) -> Any:
    result = invoke("generate", *arguments, "-n", 12, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_generate_computes_with_it_and_says_so(invoke: Invoke, short: Path, one: Path) -> None:
    with load(short, adapter=one) as model:
        wanted = model.generate(PROMPT, max_tokens=12)
        info = model.adapters[one.name]
        assert wanted.text != model.generate(PROMPT, max_tokens=12, adapter=None).text
    found = generated(invoke, short, "-p", PROMPT, "--adapter", f"sql={one}")
    assert found["text"] == wanted.text
    assert found["adapter"] == {
        "name": "sql", "kind": "mlx-lm", "scale": 1.0, "fingerprint": info.fingerprint,
    }  # fmt: skip
    assert generated(invoke, short, "-p", PROMPT)["adapter"] is None


def test_a_scale_of_zero_is_the_model_itself(invoke: Invoke, short: Path, one: Path) -> None:
    plain = generated(invoke, short, "-p", PROMPT)
    assert generated(invoke, short, "-p", PROMPT, "--adapter", f"{one}=0")["text"] == plain["text"]


def test_what_is_to_be_said_of_it_is_said_once(invoke: Invoke, short: Path, two: Path) -> None:
    for command in (("generate", "-p", PROMPT), ("chat", "-p", PROMPT)):
        name, *rest = command
        result = invoke(name, short, *rest, "-n", 2, "--no-stats", "--adapter", f"b={two}")
        assert result.stderr.count("note: adapter b: dropout 0.1") == 1, result.stderr


def test_a_draft_has_none(invoke: Invoke, short: Path, one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = generated(invoke, short, "-p", PROMPT, "--adapter", one)
    assert generated(invoke, short, "-p", PROMPT, "--adapter", one, "--draft", short)["text"] == plain["text"]


def test_a_saved_prompt_is_of_its_adapter(invoke: Invoke, short: Path, one: Path, two: Path, tmp_path: Path) -> None:
    adapted, plain = tmp_path / "adapted", tmp_path / "plain"
    wanted = generated(invoke, short, "-p", PROMPT, "--adapter", one, "--save-prompt", adapted)
    generated(invoke, short, "-p", PROMPT, "--save-prompt", plain)
    again = generated(invoke, short, "--adapter", f"other-name={one}", "--from-prompt", adapted)
    assert again["text"] == wanted["text"]
    assert again["stats"]["reused_tokens"] > 0

    refused = invoke("generate", short, "--from-prompt", adapted)
    assert_one_error(refused, f"the adapter {one.name} at scale 1.0", "(--adapter PATH=1.0)")
    advised = generated(invoke, short, "--from-prompt", adapted, "--adapter", f"{one}=1.0")
    assert advised["text"] == wanted["text"]
    for adapter in (two, f"{one}=0.5"):
        refused = invoke("generate", short, "--from-prompt", adapted, "--adapter", adapter)
        assert refused.exit_code == 1
        assert "which is not loaded; load the model with it (--adapter PATH=1.0)" in refused.stderr.splitlines()[-1]
    assert_one_error(
        invoke("generate", short, "--from-prompt", plain, "--adapter", one), "without an adapter", "without --adapter"
    )
    assert generated(invoke, short, "--from-prompt", plain)["stats"]["reused_tokens"] > 0


def test_a_chat_goes_from_one_to_another(invoke: Invoke, short: Path, one: Path, two: Path) -> None:
    talk = ["Hello", "/adapter b", "/reset", "Hello", "/adapter none", "/reset", "Hello", "/adapter", "/adapter c"]
    options = ("-n", 8, "--temp", 0)
    result = invoke("chat", short, *options, "--adapter", f"a={one}", "--adapter", f"b={two}", input="\n".join(talk))
    assert result.exit_code == 0
    question = [{"role": "user", "content": "Hello"}]
    sampling = SamplingParams(top_p=0.95)
    with load(short) as model:
        model.adapters.add(one, name="a")
        model.adapters.add(two, name="b")
        texts = [model.chat(question, sampling=sampling, max_tokens=8, adapter=name).text for name in ("a", "b", None)]
    assert len(set(texts)) == 3
    assert result.stdout == "".join(text if text.endswith("\n") else f"{text}\n" for text in texts)
    said = result.stderr
    assert "(answers from now on are computed with b)" in said
    assert "(answers from now on are computed with the model itself)" in said
    assert "a  mlx-lm, scale 1, " in said
    assert "in use" not in said
    assert "error: there is no adapter 'c'; there are: a, b" in said
    nothing = invoke("chat", short, input="/adapter\n").stderr
    assert "there are no adapters; --adapter PATH loads one" in nothing


@pytest.fixture
def text(tmp_path: Path) -> Path:
    place = tmp_path / "verses.txt"
    place.write_text("And it came to pass in those days, that there went out a decree from Caesar Augustus.\n")
    return place


def test_evaluate_measures_it_beside_the_model_without(
    invoke: Invoke, short: Path, one: Path, text: Path, tmp_path: Path
) -> None:
    command = ("evaluate", short, "--text", text, "--window", 16)
    saved = tmp_path / "saved"
    result = invoke(*command, "--adapter", f"a={one}", "--reference", short, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    with load(short, adapter=one) as model:
        wanted = evaluate(model, read_texts([text]), window=16)
        model.adapters.use(None)
        plain = evaluate(model, read_texts([text]), window=16)
    assert found["perplexity"] == pytest.approx(wanted.overall.perplexity, rel=1e-5)
    assert found["perplexity"] != pytest.approx(plain.overall.perplexity, rel=1e-2)
    assert found["perplexity_ratio"] == pytest.approx(wanted.overall.perplexity / plain.overall.perplexity, rel=1e-5)
    assert (found["model"], found["adapter"]["name"], found["reference"]) == (short.name, "a", short.name)
    # A reference that was made with it is named so, and is what it was made from.
    assert invoke(*command, "--adapter", f"a={one}=0.5", "--save-reference", saved).exit_code == 0
    result = invoke(*command, "--adapter", f"b={one}=0.5", "--reference", saved, "--json")
    found = json.loads(result.stdout)
    assert found["reference"] == f"{short.name} with a (scale 0.5)"
    assert found["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert "with b (scale 0.5)" in invoke(*command, "--adapter", f"b={one}=0.5").stdout


@pytest.mark.filterwarnings("default")  # of lm_eval and what it imports
def test_tasks_are_answered_with_it(
    invoke: Invoke, short: Path, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    import datasets

    from mlx_mixtral.evaluation.harness.responder import Responder

    # Two continuations of one context, which are computed after copies of it, and one of another.
    asked = [("And it came", " to pass"), ("And it came", " in those days"), ("def f(x):", " return")]
    with load(short, adapter=one) as model:
        answers = Responder(model).loglikelihood(asked)
        texts = Responder(model).generate_until([("And it came", {"until": ["."], "max_gen_toks": 6})])
        assert model.generate("And it came", max_tokens=6, stop=".").text == texts[0]
        for (context, continuation), answer in zip(asked, answers, strict=True):
            ids, first = model.tokenizer.encode(context + continuation), len(model.tokenizer.encode(context))
            logits = model.logits(ids).astype(mx.float32)
            scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            wanted = sum(scores[place - 1, ids[place]].item() for place in range(first, len(ids)))
            assert answer.logprob == pytest.approx(wanted, abs=1e-4)
    monkeypatch.chdir(TASKS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    command = ("evaluate", short, "--tasks", "tiny_arithmetic", "--task-path", TASKS, "--limit", "2")
    result = invoke(*command, "--adapter", f"a={one}", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["adapter"]["name"] == "a"


@pytest.mark.parametrize("other", ["another", "none", "scale"])
def test_an_evaluation_is_not_continued_with_another(
    invoke: Invoke, short: Path, one: Path, two: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:  # fmt: skip
    command = ("evaluate", short, "--text", text, "--passkey", "--lengths", 128, "--depths", 0)
    command = (*command, "--output", tmp_path / "found.json")

    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Mixtral, "generate", interrupted)
        assert invoke(*command, "--adapter", one).exit_code == 130
    changed = {"another": ("--adapter", two), "none": (), "scale": ("--adapter", f"{one}=0.5")}[other]
    assert_one_error(invoke(*command, *changed), "--restart")
    assert invoke(*command, "--adapter", f"renamed={one}", "--json").exit_code == 0


def test_a_report_says_what_it_was_measured_with(
    invoke: Invoke, short: Path, one: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--text", text, "--window", 16, "--lengths", 128, "--depths", 0, "--no-plots", "--json")
    result = invoke("report", short, "--adapter", f"a={one}=0.5", *options)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["adapter"]["name"], found["adapter"]["scale"]) == ("a", 0.5)
    with load(short) as model:
        model.adapters.add(one, name="a", scale=0.5)
        model.adapters.use("a")
        wanted = evaluate(model, read_texts([text]), window=16)
    assert found["evaluation"]["perplexity"] == pytest.approx(wanted.overall.perplexity)
    markdown = (tmp_path / f"{short.name}-a-report" / "README-section.md").read_text()
    assert f"## Evaluation of {short.name} with a (scale 0.5)" in markdown
    assert f"adapter a (mlx-lm, scale 0.5, sha256 {found['adapter']['fingerprint'][:12]}…)" in markdown


def test_the_choices_of_experts_are_its(invoke: Invoke, short: Path, one: Path, text: Path) -> None:
    def shares(*options: object) -> Any:
        result = invoke("routing", short, "--text", text, "--json", "--sample", 0, *options)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    assert shares("--adapter", f"{one}=0")["overall"] == shares()["overall"]
    assert shares("--adapter", one)["overall"] != shares()["overall"]


def test_bench_measures_it_beside_mlx_lm(
    invoke: Invoke, short: Path, one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_mixtral.bench.run.copy_rates", lambda repeats: copy_rates(2**22, repeats))
    with load(short) as model:
        own, plain = model.nbytes, TokenTraffic(model).bytes_at(0)
        config = model.config
    rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    sizes = ("--prompt", 3, "--depth", 4, "--batch", 2, "--tokens", 2, "--repeats", 1)
    result = invoke("bench", short, "--adapter", f"a={one}", *sizes, "--compare", "mlx-lm", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["adapter"]["name"] == "a"
    held = mx.load(str(one / "adapters.safetensors"))
    assert isinstance(held, dict)
    # In float32 on the CPU. q, k and v are one matrix here, and B of its changes is block-diagonal.
    whole = sum(array.nbytes for array in held.values())
    for name, array in held.items():
        if name.endswith(("q_proj.lora_b", "k_proj.lora_b", "v_proj.lora_b")):
            whole += array.nbytes // array.shape[1] * (rows - array.shape[1])
    assert found["load"]["mlx-mixtral"]["weight_bytes"] == own + whole
    experts = sum(array.nbytes for name, array in held.items() if "switch_mlp" in name)
    # Of the experts' part a token reads that of its own.
    share = config.num_experts_per_tok / config.num_local_experts
    with load(short, adapter=one) as model:
        assert TokenTraffic(model).bytes_at(0) - plain == whole - experts + experts * share
    refused = invoke("bench", short, "--adapter", f"{one}=0.5", *sizes, "--compare", "mlx-lm")
    assert_one_error(refused, "at another scale than its own (here 0.5)", "--compare")


def test_mlx_lm_computes_with_the_same_adapter(short: Path, one: Path) -> None:
    pytest.importorskip("mlx_lm")
    ids = [1, 300, 401, 502, 333]
    theirs = MlxLm(short, None, one, in_float32=True)
    with load(short, adapter=one) as model:
        logits = model.logits(ids)
        np.testing.assert_allclose(np.asarray(theirs._network(mx.array([ids]))[0]), np.asarray(logits), atol=5e-5)
    theirs.close()


def test_one_from_the_hub_keeps_its_name(
    invoke: Invoke, short: Path, one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder that a download leaves is called by its commit."""
    monkeypatch.setattr(Source, "resolve_adapter", lambda self, **options: one)
    found = generated(invoke, short, "-p", PROMPT, "--adapter", "owner/lora-sql@main=0.5")["adapter"]
    assert (found["name"], found["scale"]) == ("lora-sql", 0.5)


def test_the_rows_that_bench_times_are_the_adapters(short: Path, one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int | None] = []
    submit = Scheduler.submit

    def watched(self: Scheduler, request: Request, **options: Any) -> int:
        seen.append(request.adapter)
        return submit(self, request, **options)

    monkeypatch.setattr(Scheduler, "submit", watched)
    with load(short, adapter=one) as model:
        Ours(model).batch([[1, 2, 3], [4, 5, 6]], 2)
        assert seen == [model.adapters.number_of(one.name)] * 2


def test_several_machines_have_it(short: Path, one: Path) -> None:
    with load(short, adapter=one, device="cpu") as model:
        wanted = model.generate(PROMPT, max_tokens=6).token_ids
    command = ("generate", short, "-p", PROMPT, "-n", "6", "--adapter", one, "--device", "cpu", "--json")
    with ranks(2, "-m", "mlx_mixtral", *command, "--split", "experts") as machines:
        assert ended(machines) == [0, 0], [each.said for each in machines]
        assert json.loads("".join(machines[0].out))["token_ids"] == list(wanted)


def test_settings_name_them(
    invoke: Invoke, short: Path, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.toml"
    monkeypatch.setenv("MLX_MIXTRAL_CONFIG", str(file))
    file.write_text(f'[generate]\nadapter = ["a={one}"]\n')
    assert generated(invoke, short, "-p", PROMPT)["adapter"]["name"] == "a"


@pytest.mark.parametrize("command", ["generate", "chat", "bench", "evaluate", "report", "routing", "serve"])
def test_bad_ones_are_refused_in_a_line(
    invoke: Invoke, command: str, short: Path, one: Path, small: Path, tmp_path: Path
) -> None:
    texts = ("--text", one / "adapter_config.json")
    more: tuple[object, ...] = {
        "generate": ("-p", "Hi"), "chat": ("-p", "Hi"), "evaluate": texts, "routing": texts,
        "report": (*texts, "--no-plots", "--output", tmp_path / "report"), "serve": ("--port", 0),
    }.get(command, ())  # fmt: skip

    def refused(*parts: str, adapters: list[object]) -> None:
        options = [part for adapter in adapters for part in ("--adapter", adapter)]
        assert_one_error(invoke(command, short, *more, *options), *parts)

    refused("nowhere", adapters=[tmp_path / "nowhere"])
    refused("the scale is 'half'", adapters=[f"{one}=half"])
    refused("holds a model, not an adapter", adapters=[f"a={short}"])
    if command in ("chat", "serve"):
        refused("two adapters have the name", "NAME=PATH", adapters=[f"a={one}", f"a={one}=0.5"])
    else:
        refused(f"{command} takes one adapter, not 2", adapters=[f"a={one}", f"b={one}"])
    other = tmp_path / "other"
    lora(other, small, parts=PARTS)
    refused("shape", "of another model", adapters=[other])


def test_the_name_of_the_model_is_no_adapters_in_serve(invoke: Invoke, short: Path, one: Path) -> None:
    for name, more in ((short.name, ()), ("gpt", ("--alias", "gpt"))):
        refused = invoke("serve", short, "--port", 0, "--adapter", f"{name}={one}", *more)
        assert_one_error(refused, f"{name} is a name of the model and of an adapter", "NAME=")
