"""Record what Hugging Face transformers computes for tiny random Mixtral, Mistral and Llama models.

    python tests/goldens/record_transformers.py [OUT_DIR]

Each case becomes a folder with `config.json`, the weights (bfloat16) and `reference.npz`: `ids` int32 [B, L] and
`logits` float32 [B, L, V], computed in float32 from the rounded weights with eager attention; Mixtral cases named in
`WITH_ROUTER_LOGITS` add `router_logits` float32 [layers, B * L, E]; cases with `greedy` add `greedy` int32 [B, n], what
`generate` continues the first half of each row with, each alone and with a cache: frequencies change on the way.

A golden that cannot tell right from wrong is worth nothing, so every case carries `wrong` configurations: readings of
the file that an implementation could mistakenly make. The recorder fails unless each moves a logit by more than
`VISIBLE`, and unless no routing decision is closer than `ROUTER_GAP`.
"""

from __future__ import annotations

import json
import shutil
import sys
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

BATCH = 2
VISIBLE = 1e-2
ROUTER_GAP = 1e-2
WITH_ROUTER_LOGITS = {"base_8x2"}
LEGACY_KEYS = {"rope_theta", "rope_scaling", "original_max_position_embeddings"}

Settings = dict[str, Any]
State = dict[str, torch.Tensor]

# Wide models quantise in groups of 64; narrow ones, for cases about one formula, in groups of 32.
WIDE: Settings = {
    "model_type": "mixtral",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
NARROW: Settings = WIDE | {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
NARROW_HEADS_OF_8: Settings = NARROW | {"num_attention_heads": 4, "head_dim": 8}
DENSE: Settings = {key: value for key, value in WIDE.items() if "expert" not in key}


def without(settings: Settings, *keys: str) -> Settings:
    return {key: value for key, value in settings.items() if key not in keys}


def rope(rope_type: str = "default", theta: float = 1e6, **keys: Any) -> Settings:
    """The current spelling of rotary settings."""
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **keys}}


@dataclass(frozen=True)
class Case:
    """One model: `settings` as its config.json spells them, `wrong` changes that must be visible in the logits."""

    name: str
    settings: Settings
    length: int = 24
    wrong: dict[str, Settings] = field(default_factory=dict)
    same_as: str | None = None
    greedy: int = 0
    save: Settings = field(default_factory=dict)


def legacy(settings: Settings, **keys: Any) -> Settings:
    """`settings` as transformers 4 wrote them: `rope_theta`, `rope_scaling`, no `rope_parameters` and no `head_dim`."""
    return without(settings, "rope_parameters", "head_dim") | keys


YARN: Settings = {"factor": 4.0, "original_max_position_embeddings": 16}
YARN_EXPLICIT: Settings = YARN | {"attention_factor": 1.3, "beta_fast": 0.5, "beta_slow": 0.05}
YARN_MSCALE: Settings = YARN | {"mscale": 3.0, "mscale_all_dim": 0.5, "beta_slow": 0.2, "truncate": False}
LLAMA3: Settings = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHORT = [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5]
LONG = [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0]
LONGROPE: Settings = {"short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 32}
LONGROPE_WRONG: dict[str, Settings] = {
    "unscaled": rope(theta=100.0),
    "lists swapped": rope("longrope", 100.0, **LONGROPE | {"short_factor": LONG, "long_factor": SHORT}),
    "attention_factor 1": rope("longrope", 100.0, **LONGROPE, attention_factor=1.0),
    "factor ignored": rope("longrope", 100.0, **LONGROPE, factor=2.0),
}


CASES = [
    Case(
        "base_8x2",
        WIDE | {"num_local_experts": 8},
        wrong={"theta 1e4": rope(theta=1e4), "top-1": {"num_experts_per_tok": 1}},
    ),
    Case(
        "head_dim",
        NARROW | {"head_dim": 32},
        wrong={"hidden / heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}},
    ),
    Case(
        "sliding_window",
        NARROW | {"num_hidden_layers": 2, "sliding_window": 8},
        length=32,
        wrong={f"window {window}": {"sliding_window": window} for window in (None, 7, 9)},
    ),
    Case("rope_theta", NARROW | rope(theta=5000.0), wrong={"1e6": rope(), "1e4": rope(theta=1e4)}),
    Case("rope_theta_legacy", legacy(NARROW, rope_theta=5000.0), wrong={"1e6": rope()}, same_as="rope_theta"),
    Case("rope_theta_missing", legacy(NARROW), wrong={"theta 1e4": rope(theta=1e4)}),
    Case(
        "rope_linear_legacy",
        legacy(NARROW, rope_theta=1e4, rope_scaling={"type": "linear", "factor": 4.0}),
        wrong={"unscaled": rope(theta=1e4), "theta 1e6": rope("linear", factor=4.0)},
    ),
    Case(
        "rope_yarn",
        NARROW | rope("yarn", 20.0, **YARN),
        length=48,
        wrong={
            "unscaled": rope(theta=20.0),
            "linear": rope("linear", 20.0, factor=4.0),
            "attention_factor 1": rope("yarn", 20.0, **YARN, attention_factor=1.0),
            "original length": rope("yarn", 20.0, **YARN | {"original_max_position_embeddings": 256}),
            "not truncated": rope("yarn", 20.0, **YARN, truncate=False),
        },
    ),
    Case(
        "rope_yarn_explicit",
        NARROW | rope("yarn", 1e4, **YARN_EXPLICIT),
        length=48,
        wrong={
            f"no {key}": rope("yarn", 1e4, **without(YARN_EXPLICIT, key))
            for key in ("attention_factor", "beta_fast", "beta_slow")
        },
    ),
    Case(
        "rope_yarn_mscale",
        NARROW | rope("yarn", 100.0, **YARN_MSCALE),
        length=48,
        wrong={
            f"no {key}": rope("yarn", 100.0, **without(YARN_MSCALE, key))
            for key in ("mscale", "mscale_all_dim", "truncate")
        },
    ),
    Case(
        "rope_yarn_legacy",
        legacy(
            NARROW,
            head_dim=16,  # transformers does not derive it for yarn
            rope_theta=20.0,
            rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            original_max_position_embeddings=16,
        ),
        length=48,
        wrong={"inner original length": {"original_max_position_embeddings": 64}},
        same_as="rope_yarn",
    ),
    Case(
        "rope_llama3",
        NARROW | rope("llama3", 1e4, **LLAMA3),
        length=48,
        wrong={
            "unscaled": rope(theta=1e4),
            "linear": rope("linear", 1e4, factor=4.0),
            "low_freq_factor": rope("llama3", 1e4, **LLAMA3 | {"low_freq_factor": 2.0}),
            "high_freq_factor": rope("llama3", 1e4, **LLAMA3 | {"high_freq_factor": 8.0}),
        },
    ),
    # At and below the context nothing is scaled.
    Case(
        "rope_dynamic_below",
        NARROW | rope("dynamic", 100.0, factor=2.0) | {"max_position_embeddings": 16},
        length=16,
        wrong={"length unnoticed": {"max_position_embeddings": 8}},
    ),
    Case(
        "rope_dynamic_greedy",
        NARROW
        | rope("dynamic", 100.0, factor=4.0)
        | {"max_position_embeddings": 16, "num_hidden_layers": 2, "eos_token_id": None},
        length=24,
        wrong={"length unnoticed": {"max_position_embeddings": 64}},
        greedy=40,
    ),
    Case(
        "rope_longrope_greedy",
        NARROW
        | rope("longrope", 100.0, **LONGROPE | {"original_max_position_embeddings": 16})
        | {"num_hidden_layers": 2, "eos_token_id": None},
        length=24,
        wrong={"unscaled": rope(theta=100.0)},
        greedy=20,
    ),
    Case(
        "rope_dynamic",
        NARROW | rope("dynamic", 100.0, factor=2.0) | {"max_position_embeddings": 16},
        length=48,
        wrong={
            "unscaled": rope(theta=100.0),
            "factor": rope("dynamic", 100.0, factor=4.0),
            "length unnoticed": {"max_position_embeddings": 64},
        },
    ),
    # 32 tokens is the last length that takes the short factors.
    Case("rope_longrope_short", NARROW | rope("longrope", 100.0, **LONGROPE), length=32, wrong=LONGROPE_WRONG),
    Case("rope_longrope_long", NARROW | rope("longrope", 100.0, **LONGROPE), length=33, wrong=LONGROPE_WRONG),
    Case("tied_embeddings", NARROW | {"tie_word_embeddings": True}),
    Case("top1_of_4", NARROW | {"num_experts_per_tok": 1}, wrong={"top-2": {"num_experts_per_tok": 2}}),
    Case(
        "top3_of_8",
        NARROW | {"num_local_experts": 8, "num_experts_per_tok": 3},
        wrong={"top-2": {"num_experts_per_tok": 2}},
    ),
    Case("mistral", DENSE | {"model_type": "mistral", "sliding_window": None}, wrong={"theta 1e4": rope(theta=1e4)}),
    Case("llama", DENSE | {"model_type": "llama"}, wrong={"theta 1e4": rope(theta=1e4)}),
    Case("one_kv_head", NARROW_HEADS_OF_8),
    Case("full_kv_heads", NARROW_HEADS_OF_8 | {"num_key_value_heads": 4}),
    Case("one_expert", NARROW | {"num_hidden_layers": 2, "num_local_experts": 1, "num_experts_per_tok": 1}),
    Case("sharded", WIDE | {"num_hidden_layers": 1}, save={"max_shard_size": "64KB"}),
    Case("fused", WIDE | {"num_hidden_layers": 1}, same_as="sharded", save={"save_original_format": False}),
    Case("five_experts_width_96", NARROW | {"num_local_experts": 5, "intermediate_size": 96}),
]


def build(settings: Settings, state: State | None = None) -> PreTrainedModel:
    """A float32 model in eager attention; its own initialisation stands where `state` is None."""
    settings = deepcopy(settings)  # transformers completes rope_parameters in place
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    experts = {"experts_implementation": "eager"} if config.model_type == "mixtral" else {}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager", **experts)
    if state is not None:
        model.load_state_dict(state)
    return model.eval()


def random_state(model: PreTrainedModel, seed: int = 0) -> State:
    """Weights large enough for peaked attention and clear routing, rounded to bfloat16 and kept in float32."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            value = 1 + 0.2 * noise
        elif name.endswith("embed_tokens.weight"):
            value = 0.5 * noise
        else:
            value = 1.5 * noise / parameter.shape[-1] ** 0.5
        parameter.data = value.bfloat16().float()
    return model.state_dict()


@torch.no_grad()
def run(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits [B, L, V] and, for Mixtral, router logits [layers, B * L, E] of one forward pass."""
    if model.config.model_type != "mixtral":
        return model(ids, use_cache=False).logits, None
    output = model(ids, use_cache=False, output_router_logits=True)
    return output.logits, torch.stack(output.router_logits)


@torch.no_grad()
def continued(case: Case, state: State, ids: torch.Tensor) -> torch.Tensor:
    """Greedy tokens [B, n] after the first half of each row, every row by a model that has seen no other length."""
    rows = []
    for row in ids[:, : case.length // 2]:
        model = build(case.settings, state)
        found = model.generate(
            row[None],
            attention_mask=torch.ones_like(row[None]),
            max_new_tokens=case.greedy,
            do_sample=False,
            pad_token_id=0,
        )
        rows.append(found[0, len(row) :])
    return torch.stack(rows)


def smallest_router_gap(router_logits: torch.Tensor | None, config: PreTrainedConfig) -> float:
    """The least distance between the last expert chosen and the first one left out."""
    if router_logits is None or config.num_experts_per_tok == config.num_local_experts:
        return float("inf")
    ranked = router_logits.sort(dim=-1, descending=True).values
    k = config.num_experts_per_tok
    return float((ranked[..., k - 1] - ranked[..., k]).min())


def draw_ids(case: Case, state: State, attempts: int = 2000) -> tuple[torch.Tensor, float]:
    """The first random ids [B, L] on which no routing decision hangs on rounding."""
    for seed in range(attempts):
        model = build(case.settings, state)  # a fresh one: dynamic RoPE remembers lengths
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, model.config.vocab_size, (BATCH, case.length), generator=generator)
        gap = smallest_router_gap(run(model, ids)[1], model.config)
        if gap > ROUTER_GAP:
            return ids, gap
    raise SystemExit(f"{case.name}: no ids with router gap above {ROUTER_GAP} in {attempts} attempts")


def save(case: Case, model: PreTrainedModel, folder: Path) -> None:
    """Write config.json in the case's own spelling, and the weights in bfloat16."""
    shutil.rmtree(folder, ignore_errors=True)
    deepcopy(model).to(torch.bfloat16).save_pretrained(folder, **case.save)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if "rope_parameters" not in case.settings:
        path = folder / "config.json"
        config = without(json.loads(path.read_text()), "rope_parameters")
        config = {key: value for key, value in config.items() if value is not None}
        config |= {key: value for key, value in case.settings.items() if key in LEGACY_KEYS}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_wrong_readings(case: Case, state: State, ids: torch.Tensor, logits: torch.Tensor) -> str:
    """Fail unless every wrong reading shows; returns the differences for the report."""
    shown = []
    for name, changes in case.wrong.items():
        settings = case.settings | changes
        if "rope_parameters" in changes:
            settings = without(settings, *LEGACY_KEYS)
        difference = float((run(build(settings, state), ids)[0] - logits).abs().max())
        if not difference > VISIBLE:
            raise SystemExit(f"{case.name}: reading it as {name!r} moves the logits by only {difference:.2g}")
        shown.append(f"{name}: {difference:.2f}")
    return ", ".join(shown)


def check_files(case: Case, folder: Path, ids: torch.Tensor, logits: torch.Tensor) -> list[str]:
    """Fail unless the files alone give the logits, to the bit; returns the tensor names in them."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if hasattr(loaded.config, "num_local_experts"):
        loaded.set_experts_implementation("eager")
    if not torch.equal(run(loaded.eval(), ids)[0], logits):
        raise SystemExit(f"{case.name}: reloading the files gives other logits")
    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as tensors:
            names.extend(tensors.keys())
    return names


def record(case: Case, out: Path) -> torch.Tensor:
    """Write one case and return its logits."""
    state = random_state(build(case.settings))
    ids, gap = draw_ids(case, state)
    model = build(case.settings, state)
    logits, router_logits = run(model, ids)
    wrong = check_wrong_readings(case, state, ids, logits)
    folder = out / case.name
    save(case, model, folder)
    names = check_files(case, folder, ids, logits)
    arrays = {"ids": ids.numpy().astype(np.int32), "logits": logits.numpy()}
    if case.name in WITH_ROUTER_LOGITS and router_logits is not None:
        arrays["router_logits"] = router_logits.numpy()
    if case.greedy:
        arrays["greedy"] = continued(case, state, ids).numpy().astype(np.int32)
        print(f"{'':22} greedy {arrays['greedy'].tolist()}")
    np.savez_compressed(folder / "reference.npz", **arrays)
    size = sum(path.stat().st_size for path in folder.iterdir())
    shape = "x".join(map(str, logits.shape))
    print(f"{case.name:22} {size:7d} B  logits {shape} std {logits.std():.2f}  gap {gap:.3f}  {len(names)} tensors")
    if wrong:
        print(f"{'':22} {wrong}")
    return logits


def main(out: Path) -> None:
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    recorded: dict[str, torch.Tensor] = {}
    for case in CASES:
        recorded[case.name] = record(case, out)
        if case.same_as and not torch.equal(recorded[case.name], recorded[case.same_as]):
            raise SystemExit(f"{case.name}: differs from {case.same_as}, of which it is another spelling")
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{len(CASES)} cases, {total} bytes in all")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "transformers")
