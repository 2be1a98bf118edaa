"""Decoding with speculation beside decoding without, on one model in one run: tokens a forward, acceptance, tok/s, same output.

    python tests/benchmarks/speculation.py [FOLDER] [--draft FOLDER] [--tokens 96] [--repeats 5] [--json]

FOLDER is the bundled checkpoint when left out. Prompts are copy-heavy (an edit, a summary by quotation, code to be changed)
but for the last, which repeats nothing (what is made of it may). ``lookup, all`` proposes 15 tokens wherever it finds
something, which makes tokens a forward a property of the text; ``lookup`` is the default, which proposes what pays by measured
times. Greedy; output is compared id by id. Sides take turns; medians. On the CPU backend a forward over n tokens may cost
nearly n times one over one token, and then there is little to gain: it is otherwise where reading the weights takes the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from mlx_mixtral import DraftModel, Generation, Mixtral, PromptLookup, load
from mlx_mixtral.demo import checkpoint_path

LETTER = (
    "And Moses spake unto the children of Israel, saying, This is the thing which the LORD hath commanded: take ye gold, and "
    "silver, and brass, and fine linen, and bring it unto the door of the tabernacle before the going down of the sun, that "
    "the work may be finished."
)
CODE = """\
def area(width, height):
    if width < 0 or height < 0:
        raise ValueError("a side is negative")
    result = width * height
    return result
"""
PROMPTS = {
    "edit": f"{LETTER.replace('Moses', 'Aaron')}\n\n{LETTER}\n\n{LETTER.replace('Moses', 'Joshua')[:24]}",
    "quote": f"{LETTER}\n\nAnd it is written: {LETTER[:90]}",
    "code": f"{CODE}\n\n{CODE.replace('area', 'surface')}\n\n{CODE.replace('area', 'space')[:22]}",
    "control": "The history of the sea begins with",
}


def measured(model: Mixtral, prompt: str, tokens: int, speculation: PromptLookup | DraftModel | None) -> Generation:
    return model.generate(prompt, max_tokens=tokens, speculation=speculation)


def row(name: str, side: str, runs: list[Generation], plain: list[Generation]) -> dict[str, Any]:
    done, rates = runs[-1].stats.speculation, [run.stats.decode_tok_s for run in runs]
    return {
        "prompt": name,
        "side": side,
        "tokens": len(runs[0].token_ids),
        "tokens_per_forward": 1.0 if done is None else done.tokens_per_forward,
        "proposed": 0 if done is None else done.proposed,
        "acceptance": 0.0 if done is None else done.acceptance,
        "identical": all(run.token_ids == plain[0].token_ids for run in runs),
        "tok_s": statistics.median(rates),
        "tok_s_range": [min(rates), max(rates)],
        "ratio": statistics.median(rates) / statistics.median(run.stats.decode_tok_s for run in plain),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=checkpoint_path())
    parser.add_argument("--draft", type=Path, help="a smaller model with the same vocabulary")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", help="budget of the model, such as 12GB")
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON at the end")
    args = parser.parse_args()
    model = load(args.folder, memory=args.memory)
    sides: dict[str, PromptLookup | DraftModel | None] = {
        "plain": None,
        "lookup": PromptLookup(),
        "lookup, all": PromptLookup(adaptive=False),
    }
    if args.draft is not None:
        draft = load(args.draft)
        sides["draft"], sides["draft, all"] = DraftModel(draft), DraftModel(draft, max_tokens=4, adaptive=False)
    rows = []
    print(f"{'prompt':<9}{'':<13}{'tokens/forward':>15}{'accepted':>15}{'same output':>13}{'tok/s':>22}{'ratio':>8}")
    for name, prompt in PROMPTS.items():
        runs: dict[str, list[Generation]] = {side: [] for side in sides}
        measured(model, prompt, args.tokens, None)
        for _ in range(args.repeats):
            for side, speculation in sides.items():
                runs[side].append(measured(model, prompt, args.tokens, speculation))
        for side, done in runs.items():
            rows.append(row(name, side, done, runs["plain"]))
            at = rows[-1]
            accepted = f"{at['acceptance']:.0%} of {at['proposed']}" if at["proposed"] else "-"
            rate = f"{at['tok_s']:.1f} ({at['tok_s_range'][0]:.1f} to {at['tok_s_range'][1]:.1f})"
            same = "yes" if at["identical"] else "NO"
            print(
                f"{name:<9}{side:<13}{at['tokens_per_forward']:>15.2f}{accepted:>15}{same:>13}{rate:>22}{at['ratio']:>7.2f}x"
            )
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
