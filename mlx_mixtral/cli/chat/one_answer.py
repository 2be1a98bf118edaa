"""One question and its answer, without a session."""

from __future__ import annotations

from mlx_mixtral import TextStream
from mlx_mixtral.cli.adapters import adapter_used
from mlx_mixtral.cli.answer import print_answer
from mlx_mixtral.cli.chat.settings import AnswerOptions
from mlx_mixtral.cli.load import LoadedModel
from mlx_mixtral.cli.streaming import Interruptible
from mlx_mixtral.constraints.specs import ConstraintSpec
from mlx_mixtral.generation.request import Speculation

__all__ = ["print_one_answer"]


def print_one_answer(
    loaded: LoadedModel,
    messages: list[dict[str, str]],
    options: AnswerOptions,
    speculation: Speculation | None,
    constraint: ConstraintSpec | None,
    *,
    as_json: bool,
    with_stats: bool,
) -> None:
    """Print the answer to ``messages`` as ``generate`` prints a text.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; what had been generated is printed.
        ContextLengthError, TokenizerError, InvalidRequestError: as ``Mixtral.stream_chat``.
    """

    def begin(interrupt: Interruptible) -> TextStream:
        return loaded.model.stream_chat(
            messages,
            **options.arguments(),
            cancelled=interrupt.cancelled,
            on_prefill=interrupt.on_prefill,
            speculation=speculation,
            constraint=constraint,
        )

    adapter = adapter_used(loaded.model)
    print_answer(begin, load_s=loaded.load_s, adapter=adapter, as_json=as_json, with_stats=with_stats)
