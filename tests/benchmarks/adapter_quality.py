"""What quantising costs a model with an adapter: changes computed beside a packed base, against changes fused before packing.

    python tests/benchmarks/adapter_quality.py [--bits 4 3] [--roundings plain search gptq]

mlx-lm trains a LoRA adapter on our conversion of the bundled checkpoint, on sums in words that the model has not seen. KL of
each way to the unquantised model with that adapter, in nats a token, float32, on sums that were held back and on the held-out
texts of the bundled checkpoint. ``gptq`` is calibrated on the bundled calibration text, of the model without adapter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import yaml

from mlx_mixtral import AdapterSource, Mixtral, load
from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral_convert import Recipe, calibrate, convert

HELD_OUT = Path(__file__).parents[1] / "goldens" / "tiny-mixtral" / "heldout"
START, CHARACTERS = 4000, 1200
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
KEYS = [f"self_attn.{name}_proj" for name in "qkvo"]
KEYS += [f"block_sparse_moe.switch_mlp.{name}_proj" for name in ("gate", "up", "down")]


def sums(count: int, seed: int) -> list[str]:
    chance = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        one, other = chance.integers(0, 7, 2)
        lines.append(f"Question: {WORDS[one]} and {WORDS[other]}? Answer: they make {WORDS[one + other]}, my friend.")
    return lines


def train(folder: Path, place: Path, iterations: int) -> Path:
    """An adapter of mlx-lm's own training."""
    data, adapter = place / "data", place / "sums"
    data.mkdir()
    for name, count, seed in (("train", 256, 1), ("valid", 16, 2)):
        texts = ["\n".join(sums(4, seed * 1000 + index)) for index in range(count // 4)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {"lora_parameters": {"rank": 8, "scale": 2.0, "dropout": 0.0, "keys": KEYS}}
    (place / "lora.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "mlx_lm", "lora", "--model", str(folder), "--train", "--data", str(data)]
    command += ["--adapter-path", str(adapter), "--iters", str(iterations), "--batch-size", "4", "--num-layers", "-1"]
    command += ["--learning-rate", "1e-4", "--max-seq-length", "256", "-c", str(place / "lora.yaml"), "--seed", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return adapter


def log_probabilities(model: Mixtral, texts: list[list[int]]) -> list[mx.array]:
    found = [model.logits(text).astype(mx.float32) for text in texts]
    return [logits - mx.logsumexp(logits, axis=-1, keepdims=True) for logits in found]


def kl(reference: list[mx.array], found: list[mx.array]) -> float:
    """Mean over all tokens of a group of texts."""
    parts = [(mx.exp(p) * (p - q)).sum(axis=-1) for p, q in zip(reference, found, strict=True)]
    return float(mx.concatenate(parts).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--roundings", nargs="+", default=["plain", "search", "gptq"])
    parser.add_argument("--iterations", type=int, default=100)
    given = parser.parse_args()
    source = checkpoint_path()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        # mlx-lm trains in the type of the scales, and MLX's CPU backend is many times slower in 16 bits.
        convert(source, place / "trained-on", recipe=Recipe(bits=4), dtype="float32")
        adapter = AdapterSource(train(place / "trained-on", place, given.iterations))
        calibration = calibrate(source) if "gptq" in given.roundings else None
        with load(source, dtype="float32", adapter=adapter) as model:
            groups = [
                [model.tokenizer.encode("\n".join(sums(8, 77)))],
                [
                    model.tokenizer.encode(path.read_text(encoding="utf-8")[START : START + CHARACTERS])
                    for path in sorted(HELD_OUT.glob("*.txt"))
                ],
            ]
            expected = [log_probabilities(model, texts) for texts in groups]
            model.adapters.use(None)
            moved = [
                kl(*pair) for pair in zip(expected, (log_probabilities(model, texts) for texts in groups), strict=True)
            ]
        print(f"the adapter itself moves the model by {moved[0]:.4f} (sums) and {moved[1]:.4f} (held-out texts)\n")
        print("| bits | rounding | run time: sums | fused: sums | run time: texts | fused: texts |")
        print("| --- | --- | ---: | ---: | ---: | ---: |")
        for bits in given.bits:
            for rounding in given.roundings:
                recipe, dest = Recipe(bits=bits, rounding=rounding), place / f"{bits}-{rounding}"
                options = {"calibration": calibration} if rounding == "gptq" else {}
                convert(source, dest, recipe=recipe, **options)
                convert(source, Path(f"{dest}-fused"), recipe=recipe, adapters=[adapter], **options)
                found = []
                for path, own in ((dest, adapter), (Path(f"{dest}-fused"), None)):
                    with load(path, dtype="float32", adapter=own) as model:
                        found.append(
                            [kl(e, log_probabilities(model, t)) for e, t in zip(expected, groups, strict=True)]
                        )
                beside, fused = found
                numbers = " | ".join(f"{value:.4f}" for value in (beside[0], fused[0], beside[1], fused[1]))
                print(f"| {bits} | {rounding} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
