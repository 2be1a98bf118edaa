"""Print the perplexity by domain of a checkpoint and its conversions, by bits and by named recipe, as a Markdown table.
KL counts the tokens beyond the 128 likeliest at each position as one, which gives a lower bound.

python examples/perplexity_table.py [SOURCE --text FILE_OR_FOLDER] [--max-bytes N] [--only NAME ...]
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from mlx_mixtral import Evaluation, evaluate, load, read_texts
from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral_convert import NAMED, Recipe, convert

HELD_OUT = Path(__file__).parents[1] / "tests" / "goldens" / "tiny-mixtral" / "heldout"

parser = argparse.ArgumentParser()
parser.add_argument("source", nargs="?", default=checkpoint_path())
parser.add_argument("--text", default=[HELD_OUT], nargs="+")
parser.add_argument("--max-bytes", type=int, default=4000, help="bytes used of each text")
parser.add_argument("--only", nargs="+", help="rows, such as '4 bits' experts-3bit")
options = parser.parse_args()

recipes = {f"{bits} bits": Recipe(bits) for bits in (8, 6, 4, 3, 2)} | dict(NAMED)
texts = [
    replace(text, text=text.text.encode()[: options.max_bytes].decode(errors="ignore"))
    for text in read_texts(options.text)
]


def row(name: str, bits: float, found: Evaluation) -> str:
    scores = [f"{score.perplexity:.2f}" for score in (*found.domains.values(), found.overall)]
    compared = found.overall.comparison
    distance = ["0", "100%"] if compared is None else [f"{compared.kl_mean:.4f}", f"{compared.top1_agreement:.1%}"]
    return f"| {' | '.join([name, f'{bits:.2f}', *scores, *distance])} |"


with tempfile.TemporaryDirectory() as scratch:
    reference = Path(scratch) / "reference"  # the source is run once and then unloaded
    with load(options.source) as model:
        found = evaluate(model, texts, save_reference=reference)
    heads = ["model", "bits per weight", *found.domains, "all", "KL to the source", "same top token"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    print(row("source", 16, found), flush=True)
    for name in options.only or recipes:
        report = convert(options.source, Path(scratch) / name, recipe=recipes[name])
        with load(Path(scratch) / name) as model:
            found = evaluate(model, texts, reference=reference)
        print(row(name, report.bits_per_weight, found), flush=True)
