"""One machine of a group: loads models as it is told, and the first of them does what is asked of each.

python -m tests.distributed.worker '[{"folder": "…", "load": {…}, "calls": ["greedy", …]}, …]' OUT.npz
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mixtral import JsonSchema, Mixtral, PromptLookup, SamplingParams, join_group, load

__all__ = ["CALLS", "Job"]

Job = dict[str, Any]
PROMPTS = ("Once upon a time", "And God said", "def main(", "It is", "And it was so. " * 30)
SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3}


def _ids(model: Mixtral, count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, model.config.vocab_size, count).tolist()


def _logits(model: Mixtral) -> Any:
    return np.asarray(model.logits(_ids(model, 70)).astype(mx.float32))


def _greedy(model: Mixtral) -> Any:
    return model.generate(_ids(model, 40), max_tokens=64, stop_token_ids=()).token_ids


def _drawn(model: Mixtral) -> Any:
    """Without a seed: every machine has another, and only the first one's counts."""
    return len(model.generate(_ids(model, 9), max_tokens=12, sampling=SamplingParams(temperature=1.0)).token_ids) > 0


def _seeded(model: Mixtral) -> Any:
    return model.generate(_ids(model, 9), max_tokens=16, sampling=SamplingParams(temperature=1.0, seed=4)).token_ids


def _stopped(model: Mixtral) -> Any:
    found = model.generate(PROMPTS[0], max_tokens=64, stop=["the"])
    return found.text, found.finish_reason


def _batch(model: Mixtral) -> Any:
    """More prompts than rows, of other lengths: rows join and leave."""
    sampling = SamplingParams(temperature=0.7, seed=1)
    found = model.generate_batch(PROMPTS, max_tokens=16, n=2, max_rows=3, sampling=sampling)
    return [each.token_ids for each in found]


def _again(model: Mixtral) -> Any:
    """A prompt that begins like the one before."""
    before = _ids(model, 40, 1)
    model.generate(before, max_tokens=4)
    found = model.generate([*before, *_ids(model, 9, 2)], max_tokens=12)
    return found.token_ids, found.stats.reused_tokens


def _lookup(model: Mixtral) -> Any:
    return model.generate(_ids(model, 12) * 3, max_tokens=16, speculation=PromptLookup()).token_ids


def _saved(model: Mixtral) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompt.safetensors"
        model.save_prompt(file, _ids(model, 33, 5))
        model.engine.prompt_cache.clear()
        ids = model.load_prompt(file)
    found = model.generate([*ids, 7], max_tokens=8)
    return found.token_ids, found.stats.reused_tokens


def _constrained(model: Mixtral) -> Any:
    return model.generate("A name: ", max_tokens=32, constraint=JsonSchema(SCHEMA)).text


def _chat(model: Mixtral) -> Any:
    message = [{"role": "user", "content": "Who are you?"}]
    return model.chat(message, max_tokens=12, sampling=SamplingParams()).text


def _cut(model: Mixtral) -> Any:
    """Streams that are closed and rows that are cancelled on the way."""
    stream = model.stream(PROMPTS[1], max_tokens=30)
    begun = [next(stream).token_id for _ in range(5)]
    stream.close()
    with model.batch(max_rows=2) as batch:
        tickets = [batch.add(prompt, max_tokens=12)[0] for prompt in PROMPTS[:4]]
        found: dict[int, list[int]] = {ticket: [] for ticket in tickets}
        for step in range(200):
            if step == 4:
                batch.cancel(tickets[0])
                batch.cancel(tickets[3])
            for update in batch.step():
                if update.chunk is not None:
                    found[update.ticket].append(update.chunk.token_id)
            if batch.is_idle:
                break
    return begun, [found[ticket] for ticket in tickets[1:3]]


def _adapted(model: Mixtral) -> Any:
    """Rows of every adapter and of none."""
    names = [*model.adapters, None]
    prompts = [_ids(model, 20, 5), _ids(model, 9, 6), _ids(model, 20, 7)]
    each: list[Any] = [{"adapter": name} for name in names]
    return [found.token_ids for found in model.generate_batch(prompts[: len(names)], each=each, max_tokens=10)]


def _adapted_logits(model: Mixtral) -> Any:
    model.adapters.use(next(iter(model.adapters)))
    return np.asarray(model.logits(_ids(model, 50)).astype(mx.float32))


def _facts(model: Mixtral) -> Any:
    plan = model.engine.plan
    return model.nbytes, model.residency.resident_bytes, plan.resident_bytes, len(model.module.layers)


CALLS: dict[str, Callable[[Mixtral], Any]] = {
    "logits": _logits, "greedy": _greedy, "drawn": _drawn, "seeded": _seeded, "stopped": _stopped, "batch": _batch,
    "again": _again, "lookup": _lookup, "saved": _saved, "constrained": _constrained, "chat": _chat, "cut": _cut,
    "facts": _facts, "adapted": _adapted, "adapted_logits": _adapted_logits,
}  # fmt: skip


def main() -> None:
    jobs, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    group = join_group(60)
    assert group is not None
    found: dict[str, Any] = {}
    for index, job in enumerate(jobs):
        options = job["load"] | job.get("by_rank", {}).get(str(group.rank()), {})
        with load(job["folder"], group=group, peer_timeout_s=60, **options) as model:
            if not model.is_leader:
                model.follow()
                continue
            for name in job["calls"]:
                result = CALLS[name](model)
                found[f"{index} {name}"] = result if isinstance(result, np.ndarray) else np.array(json.dumps(result))
    if group.rank() == 0:
        np.savez(out, **found)


if __name__ == "__main__":
    main()
