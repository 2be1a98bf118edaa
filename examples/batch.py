"""Continue several prompts at once, each printed when it is done.

python examples/batch.py [MODEL] [PROMPT …]
"""

import sys
from collections import defaultdict

from mlx_mixtral import SamplingParams, load
from mlx_mixtral.demo import checkpoint_path

model_path = sys.argv[1] if len(sys.argv) > 1 else checkpoint_path()
prompts = sys.argv[2:] or ["In the beginning", "Au commencement", "Am Anfang", "En el principio"]
sampling = SamplingParams(temperature=0.8, seed=5)

with load(model_path) as model:
    texts: dict[int, str] = defaultdict(str)
    # Two rows at a time: the third prompt joins when one of the first two ends.
    for index, chunk in model.stream_batch(prompts, max_rows=2, max_tokens=24, sampling=sampling, stop=["\n"]):
        texts[index] += chunk.text
        if chunk.finish_reason is not None:
            print(f"{index} ({chunk.finish_reason}): {prompts[index]}{texts[index]}")
