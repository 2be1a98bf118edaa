"""Chat formats of the common families by name, and how their control tokens tell them.

Each is written down as its authors document it: ChatML (OpenAI), Llama 2 and 3 (Meta), Zephyr (Hugging Face H4), Phi-3
(Microsoft), Gemma (Google), OpenChat, Vicuna (LMSYS, version 1.1), Alpaca (Stanford). BOS stands in front of a
conversation where the tokenizer puts one in front of a text.
"""

from __future__ import annotations

from collections.abc import Container

__all__ = ["TEMPLATES", "recognised"]

_SPLIT_SYSTEM = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% set turns = messages[1:] if messages[0]['role'] == 'system' else messages %}{{ bos_token }}"
)
_ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)

TEMPLATES: dict[str, str] = {
    "chatml": (
        "{{ bos_token }}{% for turn in messages %}{{ '<|im_start|>' + turn['role'] + '\n' + turn['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{{ '<|im_start|>assistant\n' }}"
    ),
    "llama-3": (
        "{{ bos_token }}{% for turn in messages %}{{ '<|start_header_id|>' + turn['role'] + '<|end_header_id|>\n\n' }}"
        "{{ turn['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    ),
    "phi-3": (
        "{{ bos_token }}{% for turn in messages %}{{ '<|' + turn['role'] + '|>\n' + turn['content'] + '<|end|>\n' }}"
        "{% endfor %}{{ '<|assistant|>\n' }}"
    ),
    "zephyr": (
        "{{ bos_token }}{% for turn in messages %}{{ '<|' + turn['role'] + '|>\n' + turn['content'] + eos_token + '\n' }}"
        "{% endfor %}{{ '<|assistant|>\n' }}"
    ),
    "gemma": (
        _SPLIT_SYSTEM + "{% for turn in turns %}"
        "{{ '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else turn['role']) + '\n' }}"
        "{{ system + '\n\n' if loop.first and system else '' }}{{ turn['content'] | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
        "{{ '<start_of_turn>model\n' }}"
    ),
    "openchat": (
        "{{ bos_token }}{% for turn in messages %}"
        "{{ 'GPT4 Correct ' + (turn['role'] | capitalize) + ': ' if turn['role'] != 'system' else '' }}"
        "{{ turn['content'] + '<|end_of_turn|>' }}{% endfor %}{{ 'GPT4 Correct Assistant:' }}"
    ),
    "llama-2": (
        _SPLIT_SYSTEM
        + "{% for turn in turns %}{% if turn['role'] == 'user' %}{{ bos_token if not loop.first else '' }}"
        "{{ '[INST] ' }}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '' }}"
        "{{ turn['content'] | trim }}{{ ' [/INST]' }}"
        "{% else %}{{ ' ' + (turn['content'] | trim) + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "vicuna": (
        _SPLIT_SYSTEM + "{{ system + ' ' if system else '' }}{% for turn in turns %}{% if turn['role'] == 'user' %}"
        "{{ 'USER: ' + turn['content'] + ' ASSISTANT:' }}{% else %}{{ ' ' + turn['content'] + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "alpaca": (
        _SPLIT_SYSTEM + "{{ (system or '" + _ALPACA_SYSTEM + "') + '\n\n' }}{% for turn in turns %}"
        "{% if turn['role'] == 'user' %}{{ '### Instruction:\n' + turn['content'] + '\n\n### Response:\n' }}"
        "{% else %}{{ turn['content'] + eos_token + '\n\n' }}{% endif %}{% endfor %}"
    ),
}

# The first whose tokens a vocabulary has: what a fine-tune added says more than what its base model had.
_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "phi-3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "zephyr": ("<|user|>", "<|assistant|>"),
    "openchat": ("<|end_of_turn|>",),
    "mistral-v3": ("[INST]", "[/INST]"),
}


def recognised(markers: Container[str]) -> str | None:
    """The format whose control tokens are all among ``markers``."""
    return next((name for name, tokens in _TOKENS.items() if all(token in markers for token in tokens)), None)
