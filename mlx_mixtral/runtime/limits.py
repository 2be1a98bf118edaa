"""How long a sequence may be: the model's own limit, and what a memory budget holds."""

from __future__ import annotations

from mlx_mixtral.budget.plan import MemoryPlan
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import ContextLengthError

__all__ = ["context_limit", "room_after"]


def context_limit(config: MixtralConfig, plan: MemoryPlan) -> int:
    """Tokens a sequence may have: the model's own, or those a memory budget holds KV cache for."""
    own = config.max_context_tokens
    return own if plan.budget_bytes is None else min(own, plan.context_capacity)


def room_after(prompt_tokens: int, config: MixtralConfig, plan: MemoryPlan) -> int:
    """Tokens that can be generated after a prompt.

    Raises:
        ContextLengthError: none.
    """
    own, limit = config.max_context_tokens, context_limit(config, plan)
    if prompt_tokens < limit:
        return limit - prompt_tokens
    if limit == own:
        raise ContextLengthError(
            f"the prompt has {prompt_tokens} tokens; the model's context holds {own}, and one must be left to generate"
        )
    raise ContextLengthError(
        f"the prompt has {prompt_tokens} tokens; the memory budget holds KV cache for {limit}, and one must be left to "
        f"generate: reserve more with --context or context= (the model's own is {own})"
    )
