"""Commands on several machines: ``mlx.launch`` starts the same command on each, and all but the first follow it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from mlx_mixtral.distributed.environment import group_rank, is_grouped
from mlx_mixtral.errors import InvalidRequestError, MixtralError

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_mixtral.cli.options import LoadOptions

__all__ = ["follow_leader", "own_group", "refuse_in_group"]


@cache
def own_group() -> mx.distributed.Group | None:
    """The group that this process is part of, joined once; None where it is alone. Raises as ``join_group``."""
    from mlx_mixtral.distributed.group import join_group

    return join_group()


def follow_leader(model: str, loading: LoadOptions) -> None:
    """On the machines of a group that are not its first, load the model, follow, and end the process; else nothing.

    They print nothing but what is wrong, with their rank.
    """
    if not is_grouped() or (rank := group_rank()) == 0:
        return
    from mlx_mixtral import load
    from mlx_mixtral.cli.adapters import fetch_adapters
    from mlx_mixtral.cli.progress import fetch
    from mlx_mixtral.distributed.deadline import end_process
    from mlx_mixtral.distributed.link import is_lost

    try:
        group = own_group()
        assert group is not None
        folder = fetch(str(model), revision=loading.revision)
        loading = replace(loading, adapters=fetch_adapters(loading.adapters))
        with load(folder, group=group, **loading.arguments()) as loaded:
            loaded.follow()
    except KeyboardInterrupt:
        end_process(f"rank {rank}: interrupted", 130)
    except MixtralError as error:
        said = str(error)
        end_process(said if said.startswith("rank ") else f"rank {rank}: {said}")
    except (OSError, RuntimeError) as error:
        if is_lost(error):
            end_process(
                f"rank {rank}: the connection to another machine was lost; see what it said last, and start all again"
            )
        end_process(f"rank {rank}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    # Threads of MLX that still wait for others end with the process.
    end_process("", 0)


def refuse_in_group(what: str, instead: str) -> None:
    """Raise InvalidRequestError for what several machines cannot do."""
    if is_grouped():
        raise InvalidRequestError(f"{what} is not possible on several machines; {instead}")
