"""Print text as it is generated, until a stop string or a custom limit.

python examples/stream.py [MODEL] [PROMPT]
"""

import sys

from mlx_mixtral import SamplingParams, load
from mlx_mixtral.demo import checkpoint_path

model_path = sys.argv[1] if len(sys.argv) > 1 else checkpoint_path()
prompt = sys.argv[2] if len(sys.argv) > 2 else "And God said unto"
sampling = SamplingParams(temperature=0.8, seed=3, logprobs=0)

with load(model_path) as model:
    print(prompt, end="")
    surprise = 0.0
    # Leaving the `with` block closes the stream; breaking out of the loop is enough to cancel.
    with model.stream(prompt, max_tokens=200, sampling=sampling, stop=["\n"]) as chunks:
        for chunk in chunks:
            print(chunk.text, end="", flush=True)
            surprise -= chunk.logprob or 0.0
            if chunks.stats.tokens >= 60:
                break
    print(f"\n{chunks.stats.tokens} tokens, {surprise / chunks.stats.tokens:.2f} nats each")
