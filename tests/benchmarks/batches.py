"""Decode speed of batches of 1 to 16 rows, beside mlx-lm's batch generation in float32 on the same folder.

    python tests/benchmarks/batches.py [FOLDER] [--rows 1,2,4,8,16] [--tokens 12] [--repeats 5] [--json]

Both are timed by the tokens their own batch loops give, from the first step that has one for every row: our scheduler, which
``generate_batch`` runs, and mlx-lm's ``BatchGenerator``, which its ``batch_generate`` runs. Rows are different random prompts
of 32 tokens; the sides take turns. mlx-lm computes in float32, in which we compute on the CPU backend: as it comes it is
several times slower there. The folder is what ``convert --bits 4`` makes of ``make_checkpoint.py``'s mid shape.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mlx_mixtral import MixtralConfig, load
from mlx_mixtral.bench.backend import Ours
from mlx_mixtral.bench.cases import plan_cases
from mlx_mixtral.bench.measurements import OURS, BenchReport
from mlx_mixtral.bench.mlx_lm_backend import MlxLm
from mlx_mixtral.bench.run import run_bench

MID = Path(__file__).parents[2] / "bench-data" / "mid-4bit"
THEIRS = "mlx-lm float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=MID)
    parser.add_argument("--rows", default="1,2,4,8,16")
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON at the end")
    args = parser.parse_args()
    config, report = MixtralConfig.from_folder(args.folder), BenchReport()
    rows = [int(count) for count in args.rows.split(",")]
    cases = plan_cases(
        config.max_position_embeddings, prompts=[], depths=[], batches=rows, tokens=args.tokens, repeats=args.repeats
    )
    sides = {OURS: lambda: Ours(load(args.folder)), THEIRS: lambda: MlxLm(args.folder, in_float32=True)}
    run_bench(sides, cases, config.vocab_size, report)
    print(f"tok/s of all rows together, medians of {args.repeats} (least to most)")
    print(f"{'rows':>4}{'ours':>28}{'mlx-lm in float32':>28}{'ratio':>8}{'against 1 row':>15}")
    alone = report.of("batch")[0].tok_s(OURS).median
    for row in report.of("batch"):
        spreads = [row.tok_s(side) for side in (OURS, THEIRS)]
        cells = [f"{spread.median:.1f} ({spread.low:.1f} to {spread.high:.1f})" for spread in spreads]
        print(
            f"{row.case.size:>4}{cells[0]:>28}{cells[1]:>28}{row.ratio(THEIRS) or 0:>7.2f}x{spreads[0].median / alone:>14.2f}x"
        )
    if args.json:
        print(json.dumps(report.to_dict()))


if __name__ == "__main__":
    main()
