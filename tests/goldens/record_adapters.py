"""Record adapters of PEFT and mlx-lm for small random models, and the logits that these compute with them.

Each set needs an environment of its own, and `converted` comes after `v4`:

    pip install torch==2.13.0 transformers==4.57.6 peft==0.18.1 && python tests/goldens/record_adapters.py v4
    pip install torch==2.13.0 transformers==5.17.0 peft==0.18.1 && python tests/goldens/record_adapters.py old
    pip install torch==2.13.0 transformers==5.17.0 peft==0.19.1 && python tests/goldens/record_adapters.py new
    pip install torch==2.13.0 transformers==5.17.0 peft==0.21.2 && python tests/goldens/record_adapters.py converted
    pip install mlx-lm==0.32.2 && python tests/goldens/record_adapters.py mlx

`tests/goldens/adapters/KIND` holds the adapter as it was saved, and `logits.npy`. A kind that ends in the name of a base
(`tests/adapters/goldens.py`) was recorded on that one. Every trained number is random: nothing is left at zero.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.adapters.goldens import BASES, FOLDER, base_folder, base_name, tokens

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["w1", "w2", "w3"]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

V4: dict[str, dict[str, Any]] = {
    "v4-attention": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "lora_dropout": 0.05},
    "v4-experts": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", *EXPERTS]},
    "v4-router": {"r": 2, "lora_alpha": 16, "target_modules": ["gate"]},
    "v4-head": {"r": 4, "lora_alpha": 4, "target_modules": ["lm_head", "q_proj"]},
    "v4-embedding": {"r": 4, "lora_alpha": 4, "target_modules": ["embed_tokens", "lm_head"]},
    "v4-rslora": {"r": 3, "lora_alpha": 2, "target_modules": ["q_proj", "w2"], "use_rslora": True},
    "v4-patterns": {
        "r": 2, "lora_alpha": 5, "target_modules": [*ATTENTION, *EXPERTS],
        "rank_pattern": {"model.layers.0.self_attn.q_proj": 3, r"layers\.1\..*\.w[13]": 1, "k_proj": 4},
        "alpha_pattern": {"v_proj": 3, r"model\.layers\.\d+\.block_sparse_moe\.experts\.[02]\.w2": 12, "w1": 1},
    },
    "v4-some-experts": {
        "r": 4, "lora_alpha": 8, "target_modules": r"model\.layers\.1\.block_sparse_moe\.experts\.[02]\.w[12]",
    },
    "v4-dora": {"r": 2, "lora_alpha": 4, "target_modules": [*ATTENTION, "gate", "lm_head"], "use_dora": True},
    "v4-dora-experts": {"r": 2, "lora_alpha": 4, "target_modules": ["o_proj", "w1", "w2"], "use_dora": True},
    "v4-bias": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj", "gate", "w2", "lm_head"], "lora_bias": True},
    "v4-saved": {
        "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["lm_head", "embed_tokens", "norm", "input_layernorm", "gate"],
    },
    "v4-tokens": {"r": 2, "lora_alpha": 4, "target_modules": ["v_proj"], "trainable_token_indices": [78, 3, 40]},
    "v4-tokens-head": {
        "r": 2, "lora_alpha": 4, "target_modules": ["v_proj"],
        "trainable_token_indices": {"embed_tokens": [50, 20], "lm_head": [9, 80, 2]},
    },
    "v4-only-tokens": {"peft_type": "TRAINABLE_TOKENS", "token_indices": [7, 63]},
    "v4-dense": {"r": 3, "lora_alpha": 6, "target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]},
    "v4-dora-dense": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj", "down_proj"], "use_dora": True},
    "v4-tokens-tied": {"r": 2, "lora_alpha": 4, "target_modules": ["v_proj"], "trainable_token_indices": [78, 3, 40]},
}  # fmt: skip
OLD: dict[str, dict[str, Any]] = {
    "old-stacks": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": STACKS},
    "old-gate-up": {"r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": STACKS[:1]},
    "old-down": {"r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": STACKS[1:]},
    "old-stacks-square": {"r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": STACKS},
    "old-down-square": {"r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": STACKS[1:]},
    "old-gate-up-half": {"r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": STACKS[:1]},
}
NEW: dict[str, dict[str, Any]] = {
    "new-stacks": {
        "r": 3, "lora_alpha": 6, "target_modules": ATTENTION, "target_parameters": [*STACKS, "mlp.gate.weight"],
    },
    "new-gate-up": {"r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": STACKS[:1]},
    "new-down": {"r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": STACKS[1:]},
    "new-patterns": {
        "r": 2, "lora_alpha": 4, "use_rslora": True, "target_modules": ["k_proj"], "target_parameters": STACKS,
        "rank_pattern": {r".*\.gate_up_proj": 3}, "alpha_pattern": {r".*\.down_proj": 9, "experts.gate_up_proj": 2},
    },
    "new-down-square": {"r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": STACKS[1:]},
    "new-gate-up-half": {"r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": STACKS[:1]},
}  # fmt: skip
CONVERTED: dict[str, dict[str, Any]] = {"converted-experts": {"from": "v4-experts"}}
MLX: dict[str, dict[str, Any]] = {
    "mlx-lora": {"rank": 2, "scale": 2.0, "dropout": 0.05},
    "mlx-older": {"rank": 2, "scale": 2.0, "dropout": 0.0},
    "mlx-dora": {"rank": 2, "scale": 1.5, "dropout": 0.0, "keys": [f"self_attn.{key}" for key in ATTENTION]},
    "mlx-embedding": {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["model.embed_tokens", "lm_head"]},
    "mlx-dora-embedding": {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["model.embed_tokens", "lm_head"]},
    "mlx-full": {},
    "mlx-dense": {"rank": 3, "scale": 2.0, "dropout": 0.0},
    "mlx-embedding-tied": {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["model.embed_tokens", "self_attn.q_proj"]},
}  # fmt: skip
# Saved in 16 bits: logits are those of the rounded numbers.
HALVES = {"v4-attention": "bfloat16", "new-down": "float16"}


def peft_adapter(kind: str, options: dict[str, Any], base: Path, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Save the adapter; logits without and with it."""
    import peft
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    torch.manual_seed(zlib.crc32(kind.encode()))
    ids = torch.tensor([tokens(kind)])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        before = model(ids).logits[0].numpy()
    options = dict(options)
    if "from" in options:
        wrapped = peft.PeftModel.from_pretrained(model, FOLDER / options["from"], is_trainable=True).eval()
    else:
        kind_of = peft.TrainableTokensConfig if options.pop("peft_type", "") else peft.LoraConfig
        config = kind_of(task_type="CAUSAL_LM", **options)
        wrapped = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            for name, value in wrapped.named_parameters():
                if not value.requires_grad:
                    continue
                noise = torch.randn_like(value)
                if "lora_" in name and "magnitude" not in name:
                    value.copy_(noise * 0.15)
                else:
                    value.add_(noise * 0.1 * value.std())
                if kind in HALVES:
                    value.copy_(value.to(getattr(torch, HALVES[kind])))
    with torch.no_grad():
        after = wrapped(ids).logits[0].numpy()
    # With copies of the base's embedding and head where these are changed.
    embeds = "embed_tokens" in (options.get("target_modules") or ())
    wrapped.save_pretrained(folder, save_embedding_layers=embeds)
    if kind in HALVES:
        file = folder / "adapter_model.safetensors"
        halves = {name: value.to(getattr(torch, HALVES[kind])) for name, value in load_file(file).items()}
        save_file(halves, file, {"format": "pt"})
    (folder / "README.md").unlink()
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = f"example/{base_name(kind)}"
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return before, after


def mlx_adapter(kind: str, options: dict[str, Any], base: Path, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    mx.random.seed(zlib.crc32(kind.removesuffix("-tied").encode()))
    ids = mx.array([tokens(kind)])
    model, _ = load_model(base)
    before = np.array(model(ids)[0])
    layers = BASES[base_name(kind)]["num_hidden_layers"]
    settings: dict[str, Any] = {"fine_tune_type": "lora", "num_layers": layers, "model": "example/mixtral"}
    if kind == "mlx-full":
        settings["fine_tune_type"] = "full"
        names = ("q_proj.weight", "layernorm.weight", "gate.weight", "model.norm.weight")
        trained = {
            name: value + 0.1 * mx.std(value) * mx.random.normal(value.shape)
            for name, value in tree_flatten(model.parameters())
            if name.endswith(names) and "switch_mlp" not in name
        }
    else:
        settings["lora_parameters"] = options
        settings["fine_tune_type"] = "dora" if "dora" in kind else "lora"
        model.freeze()
        linear_to_lora_layers(model, layers, options, use_dora="dora" in kind)
        trained = {}
        for name, value in tree_flatten(model.parameters()):
            noise = mx.random.normal(value.shape)
            if name.endswith((".lora_a", ".lora_b")):
                trained[name] = noise * 0.15
            elif name.endswith(".m"):
                trained[name] = value + noise * 0.1 * mx.std(value)
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), trained)
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    model, _ = load_model(base)
    model = load_adapters(model, str(folder))
    model.eval()
    after = np.array(model(ids)[0])
    if kind == "mlx-older":
        older = {
            n: v.reshape(-1, v.shape[-1]) if v.ndim == 3 and n.endswith("lora_a") else v for n, v in trained.items()
        }
        mx.save_safetensors(str(folder / "adapters.safetensors"), older)
    return before, after


SETS: dict[str, tuple[dict[str, dict[str, Any]], Callable[..., tuple[np.ndarray, np.ndarray]]]] = {
    "v4": (V4, peft_adapter), "old": (OLD, peft_adapter), "new": (NEW, peft_adapter),
    "converted": (CONVERTED, peft_adapter), "mlx": (MLX, mlx_adapter),
}  # fmt: skip


def main() -> None:
    wanted, record = SETS[sys.argv[1]]
    for kind, options in wanted.items():
        folder = FOLDER / kind
        if folder.exists():
            shutil.rmtree(folder)
        FOLDER.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            before, after = record(kind, options, base_folder(kind, Path(temporary)), folder)
        np.save(folder / "logits.npy", after.astype(np.float32))
        changed = float(np.abs(after - before).max())
        print(f"{kind:24} changes logits of up to {np.abs(before).max():.2f} by {changed:.2f}")
        assert 0.05 < changed < 50, "an adapter that changes next to nothing, or everything"


if __name__ == "__main__":
    main()
