"""Many schemas through the bundled model: every text parses, and validates by ``jsonschema``.

    python -m tests.constraints.run [--schemas 200] [--first 0] [--max-tokens 320] [--folder DIR]

Greedy and at temperature 1. ``--folder`` takes ``*.json`` files in place of schemas made from a seed: each a schema, or an
object that has it under "schema" or "json_schema". What the compiler refuses is counted, as is what it does not keep.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema

from mlx_mixtral import JsonSchema, SamplingParams, load
from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral.errors import MixtralError

from .support import make_schema


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=320)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    counts: Counter[str] = Counter()
    with load(checkpoint_path()) as model:
        for name, schema in _schemas(given.folder, given.first, given.schemas):
            for temperature in (0.0, 1.0):
                sampling = SamplingParams(temperature=temperature, seed=given.first)
                try:
                    out = model.generate(
                        "As JSON:",
                        constraint=JsonSchema(schema, strict=given.folder is None),
                        sampling=sampling,
                        max_tokens=given.max_tokens,
                    )
                except MixtralError as error:
                    counts["refused: " + str(error)[:60]] += 1
                    continue
                counts["texts"] += 1
                counts[f"ended by {out.finish_reason}"] += 1
                _judge(name, temperature, schema, out.text, bool(out.stats.warnings), counts)
    for what, count in sorted(counts.items()):
        print(f"{count:5}  {what}")
    sys.exit(any(what.startswith("WRONG") for what in counts))


def _schemas(folder: Path | None, first: int, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    if folder is None:
        for seed in range(first, first + count):
            yield f"seed {seed}", make_schema(seed)
        return
    for path in sorted(folder.glob("*.json"))[first : first + count]:
        held = json.loads(path.read_text("utf-8"))
        yield path.name, held.get("schema") or held.get("json_schema") or held


def _judge(
    name: str, temperature: float, schema: dict[str, Any], text: str, warned: bool, counts: Counter[str]
) -> None:
    try:
        jsonschema.validate(json.loads(text), schema)
    except jsonschema.ValidationError as error:
        kind = "not kept, as a warning said" if warned else "WRONG: not valid"
        counts[kind] += 1
        print(f"{kind}: {name}, temperature {temperature}: {error.message[:100]}")
    except ValueError as error:
        counts["WRONG: not JSON"] += 1
        print(f"WRONG: not JSON: {name}, temperature {temperature}: {error}: {text[:200]!r}")


if __name__ == "__main__":
    main()
