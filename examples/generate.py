"""Continue a prompt and print what it took.

    python examples/generate.py [MODEL] [PROMPT]

MODEL is a folder or a hub repository; by default, the checkpoint that ships with the package.
"""

import sys

from mlx_mixtral import SamplingParams, load
from mlx_mixtral.demo import checkpoint_path

model_path = sys.argv[1] if len(sys.argv) > 1 else checkpoint_path()
prompt = sys.argv[2] if len(sys.argv) > 2 else "In the beginning"

with load(model_path) as model:
    # Greedy: the likeliest token every time.
    greedy = model.generate(prompt, max_tokens=32)
    print(prompt + greedy.text)

    # Sampled: the same seed gives the same text.
    sampled = model.generate(prompt, max_tokens=32, sampling=SamplingParams(temperature=0.8, top_p=0.95, seed=7))
    print(prompt + sampled.text)

    stats = sampled.stats
    print(f"{stats.tokens} tokens, {stats.decode_tok_s:.1f} tok/s, ended by {sampled.finish_reason}")
