"""A model card: what the hub reads (https://huggingface.co/docs/hub/model-cards), and what a person wants to know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlx_mixtral import __version__
from mlx_mixtral.evaluation.report.markdown import escaped, fenced, table
from mlx_mixtral.sizes import format_bytes
from mlx_mixtral_convert.upload.described import Uploadable

__all__ = ["model_card"]

_LIBRARIES = {"mlx": "mlx", "hf": "transformers", "gguf": "gguf"}


def model_card(
    found: Uploadable,
    repository: str,
    *,
    base_model: str | None = None,
    licence: str | None = None,
    section: str | None = None,
) -> str:
    """README.md of a repository: YAML for the hub, then sizes, errors, how to run it, and ``section``, a report's Markdown."""
    from huggingface_hub import ModelCardData

    relation = "finetune" if found.adapters else "quantized" if found.quantised else None
    others: dict[str, Any] = (
        {"base_model_relation": relation} if base_model is not None and relation is not None else {}
    )
    data = ModelCardData(
        base_model=base_model,
        library_name=_LIBRARIES[found.kind],
        license=licence,
        pipeline_tag="text-generation",
        tags=[
            *dict.fromkeys([_LIBRARIES[found.kind], "mixtral", "mlx-mixtral", *(["conversational"] * found.template)])
        ],
        **others,
    )
    blocks = [f"# {escaped(repository.rpartition('/')[2])}", *_origin(found, base_model), *_weights(found)]
    blocks += _use(found, repository)
    blocks += [section.strip()] if section else []
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(blocks) + "\n"


def _origin(found: Uploadable, base_model: str | None) -> Iterator[str]:
    named = escaped(base_model or found.source)
    linked = f"[{named}](https://huggingface.co/{base_model})" if base_model else named
    revision = f", revision `{found.revision}`" if found.revision and found.repository == base_model else ""
    what = {"mlx": "MLX", "hf": "the layout of transformers", "gguf": "GGUF, for llama.cpp"}[found.kind]
    yield (
        f"{linked}{revision}, converted to {what} by mlx-mixtral {__version__}: {format_bytes(found.nbytes)}, "
        f"{found.bits_per_weight:.2f} bits per weight, {found.parameters:,} parameters."
    )
    if found.adapters:
        fused = (f"{escaped(name)} ({escaped(kind)}, scale {scale:g})" for name, kind, scale in found.adapters)
        yield f"With LoRA adapters fused into the weights: {', '.join(fused)}."


def _weights(found: Uploadable) -> Iterator[str]:
    total = sum(found.types.values())
    rows = sorted(found.types.items(), key=lambda entry: (-entry[1], entry[0]))
    yield "## Weights"
    yield table(["stored as", "share of the weights"], [[name, f"{count / total:.2%}"] for name, count in rows])
    if found.worst:
        yield "Largest relative errors ‖w − ŵ‖ / ‖w‖ (all are in `conversion.json`):"
        yield table(
            ["matrix", "packed as", "relative error"],
            [[path.removeprefix("model."), spec, f"{error:.2%}"] for path, spec, error in found.worst],
            left=2,
        )


def _use(found: Uploadable, repository: str) -> Iterator[str]:
    yield "## How to run it"
    if found.kind == "gguf":
        (name,) = found.files
        yield fenced(f"llama-cli --hf-repo {repository} --hf-file {name}", "sh")
        yield fenced(f"mlx-mixtral convert {repository}:{name} DEST --exact", "sh")
    elif found.kind == "hf":
        code = f'from transformers import pipeline\n\npipe = pipeline("text-generation", "{repository}")\n'
        yield fenced(code + 'print(pipe("Once upon a time"))', "python")
    else:
        example = f"chat {repository}" if found.template else f'generate {repository} -p "Once upon a time"'
        yield fenced(f"pip install mlx-mixtral\nmlx-mixtral {example}", "sh")
        yield "mlx-lm runs it too:"
        yield fenced(f'mlx_lm.generate --model {repository} --prompt "Once upon a time"', "sh")
