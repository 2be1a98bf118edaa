"""Record what lm_eval's own Hugging Face backend answers for the bundled checkpoint, in float32 on the CPU.

    pip install "lm-eval[hf]>=0.4.13,<0.5" protobuf
    HF_HUB_OFFLINE=1 python tests/goldens/record_harness.py [OUT_FILE]

`harness.json` has, each with its answers: single requests of all three kinds, some longer than the context; the local
tasks of tests/evaluation/harness/tasks, sample by sample, with their metrics; and tasks asked in a chat format, a template that
is recorded too. Whole texts are read with ``add_bos_token=False``: as it comes, the backend puts a BOS of its own in front of
the one the tokenizer adds, which `rolling.two_bos` records to show the difference. Single requests are answered without its
cache of logits, which takes the wrong positions when two requests are alike but for where the continuation begins.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "mlx_mixtral" / "demo" / "tiny-mixtral"
TASKS = ROOT / "tests" / "evaluation" / "harness" / "tasks"
HELD_OUT = Path(__file__).parent / "tiny-mixtral" / "heldout"

MAX_LENGTH = 256  # of 1024: long texts need not be very long then
PLAIN = ["tiny_arithmetic", "tiny_endings", "tiny_sums", "tiny_stories"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
IN_CHAT = ["tiny_endings", "tiny_sums"]


def backend(folder: Path, **options: Any) -> HFLM:
    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4, max_length=MAX_LENGTH, **options)


def ask(model: HFLM, kind: str, requests: list[Any]) -> list[Any]:
    instances = [Instance(request_type=kind, doc={}, arguments=tuple(request), idx=0) for request in requests]
    return list(getattr(model, kind)(instances, disable_tqdm=True))


def pairs() -> list[tuple[str, str]]:
    english = (HELD_OUT / "en.txt").read_text(encoding="utf-8")
    french = (HELD_OUT / "fr.txt").read_text(encoding="utf-8")
    long = english[:1800]
    return [
        ("And God", " said"),
        ("And God", " said unto Noah, Come forth"),
        ("And God", " blessed"),
        ("And God", "dess"),
        ("And God ", "said"),
        ("", "And God said"),
        ("", "Amen."),
        ("7 * 8 =", " 56"),
        ("7 * 8 =", " 57"),
        ("7 * 8 =", " 560"),
        ("def add(a, b):\n    return", " a + b"),
        (french[:300], french[300:360]),
        (english[:400], english[400:460]),
        (english[:400], english[400:405]),
        (english[:400], " light"),
        ("Dieu dit à Noé:", " Sors de l'arche, toi et ta femme 🙂"),
        (long, " And it came to pass"),
        (long, " And"),
        ("Amen.", long[:700]),
    ]


def generations() -> list[tuple[str, dict[str, Any]]]:
    english = (HELD_OUT / "en.txt").read_text(encoding="utf-8")
    return [
        ("And God said,", {"until": ["."], "max_gen_toks": 30}),
        ("And the waters", {"until": [","], "max_gen_toks": 30}),
        ("And the waters", {"until": ["no such text"], "max_gen_toks": 12}),
        ("def main():\n", {"until": ["\n\n", "return"], "max_gen_toks": 30, "do_sample": False}),
        ("1 + 1 = 2\n2 + 2 = 4\n7 * 8 =", {"until": ["\n"], "max_new_tokens": 8, "temperature": 0.0}),
        ("Et Dieu", {"until": "la", "max_gen_toks": 20}),
        (english[:1800], {"until": ["."], "max_gen_toks": 16}),
    ]


def run(model: HFLM, names: list[str], chat: bool) -> dict[str, Any]:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=names,
        task_manager=manager,
        bootstrap_iters=1000,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    assert found is not None
    recorded = {}
    for name in names:
        metrics = {key: value for key, value in found["results"][name].items() if isinstance(value, float)}
        samples = [
            {
                "arguments": [list(args) for args in sample["arguments"]],
                "answers": [answer for answers in sample["resps"] for answer in answers],
            }
            for sample in sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        ]
        recorded[name] = {"metrics": metrics, "shots": found["n-shot"][name], "samples": samples}
    return recorded


def main(out: Path) -> None:
    print(f"lm_eval {lm_eval.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    os.chdir(TASKS)  # task files name their data from here
    plain, single, without_bos = (
        backend(CHECKPOINT, **options) for options in ({}, {"logits_cache": False}, {"add_bos_token": False})
    )
    texts = [json.loads(line)["text"] for line in (TASKS / "passages.jsonl").read_text(encoding="utf-8").splitlines()]
    rolling = [[text] for text in texts]
    result: dict[str, Any] = {
        "max_length": MAX_LENGTH,
        "pairs": {"requests": pairs(), "answers": ask(single, "loglikelihood", pairs())},
        "rolling": {
            "requests": texts,
            "answers": ask(without_bos, "loglikelihood_rolling", rolling),
            "two_bos": ask(plain, "loglikelihood_rolling", rolling),
        },
        "generations": {"requests": generations(), "answers": ask(plain, "generate_until", generations())},
        "tasks": run(plain, PLAIN, chat=False) | run(without_bos, ["tiny_passages"], chat=False),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(CHECKPOINT, Path(scratch) / "chat"))
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
        result["chat"] = {"template": TEMPLATE, "tasks": run(backend(folder), IN_CHAT, chat=True)}
    for name, task in result["tasks"].items():
        print(name, task["metrics"])
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else Path(__file__).parent / "harness.json")
