"""A conversation of two turns, in the checkpoint's own chat format.

    python examples/chat.py [MODEL]

The bundled checkpoint is not an instruct model: its answers only look like text. Use a real one for a conversation.
"""

import sys

from mlx_mixtral import SamplingParams, load
from mlx_mixtral.demo import checkpoint_path

model_path = sys.argv[1] if len(sys.argv) > 1 else checkpoint_path()
questions = ["Who was Moses?", "And who was his brother?"]
sampling = SamplingParams(temperature=0.7, top_p=0.95, seed=1)

with load(model_path) as model:
    messages = [{"role": "system", "content": "Answer in one sentence."}]
    for question in questions:
        messages.append({"role": "user", "content": question})
        print(f"user: {question}\nassistant: ", end="")
        answer = ""
        for chunk in model.stream_chat(messages, sampling=sampling, max_tokens=40):
            print(chunk.text, end="", flush=True)
            answer += chunk.text
        print()
        # You keep the conversation as a list: the model sees what is in it.
        messages.append({"role": "assistant", "content": answer.strip()})

    print(f"{len(model.tokenizer.encode_chat(messages[:-1]))} tokens before the last answer")
