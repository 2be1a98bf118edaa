"""Coloured text of a page (figure 8): one copy of the text, whose colours a choice of layer switches, without a script."""

from __future__ import annotations

import string
from collections.abc import Sequence
from html import escape

from mlx_mixtral.evaluation.routing.excerpt import Excerpt, expert_colour

__all__ = ["MAX_LAYERS", "coloured_text"]

MAX_LAYERS = 8
"""Layers to choose from; more that were asked for are left out here."""

# Control characters, which HTML cannot hold, become visible.
_CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\N{SYMBOL FOR DELETE}"}
_CONTROL |= dict.fromkeys(range(128, 160), "\N{REPLACEMENT CHARACTER}")


def coloured_text(excerpts: Sequence[Excerpt], layers: Sequence[int], num_experts: int) -> str:
    """The section, with its own style sheet; "" without text."""
    if not excerpts:
        return ""
    shown = list(zip(string.ascii_lowercase, layers[:MAX_LAYERS], strict=False))
    experts = sorted({int(e) for excerpt in excerpts for _, layer in shown for e in excerpt.experts[:, layer]})
    rules, inputs, labels = [], [], []
    for index, (letter, layer) in enumerate(shown):
        checked = " checked" if index == 0 else ""
        inputs.append(f'<input type="radio" name="layer" id="layer-{letter}"{checked}>')
        labels.append(f'<label for="layer-{letter}">layer {layer}</label>')
        rules.append(
            f"#layer-{letter}:checked~.pick [for=layer-{letter}]{{background:var(--accent);color:var(--paper)}}"
        )
        rules.append(f"#layer-{letter}:focus-visible~.pick [for=layer-{letter}]{{outline:2px solid var(--text)}}")
        for expert in experts:
            at = f"#layer-{letter}:checked"
            rules.append(f"{at}~.text .{letter}{expert}{{background:{expert_colour(expert, num_experts)}}}")
            rules.append(f"{at}~.numbers:checked~.text .{letter}{expert}::after{{content:'{expert}'}}")
    key = "".join(
        f'<li><i style="background:{expert_colour(expert, num_experts)}">{expert}</i></li>' for expert in experts
    )
    boxes = []
    for excerpt in excerpts:
        tokens = [
            f'<b class="{" ".join(f"{letter}{chosen[layer]}" for letter, layer in shown)}">{_piece(piece)}</b>'
            for piece, chosen in zip(excerpt.pieces, excerpt.experts.tolist(), strict=True)
        ]
        boxes.append(f"<div><h3>{escape(excerpt.domain)}</h3><p>{''.join(tokens)}</p></div>")
    return (
        f'<section id="text"><h2>Text coloured by first choice</h2><p>The beginning of each domain, every token in the colour '
        f"of the expert its router chose first (the paper's figure 8).</p><style>{''.join(rules)}</style>"
        f'{"".join(inputs)}<input type="checkbox" class="numbers" id="numbers">'
        f'<div class="pick">{"".join(labels)}<label for="numbers">numbers</label>'
        f'<ul class="experts"><li>expert</li>{key}</ul></div><div class="text">{"".join(boxes)}</div></section>'
    )


def _piece(text: str) -> str:
    shown = escape(text.translate(_CONTROL))
    return shown.replace("\n", "<s>⏎</s>\n").replace("\t", "<s>→</s>\t")
