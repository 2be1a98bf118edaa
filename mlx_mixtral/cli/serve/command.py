"""``mlx-mixtral serve``: a local server in OpenAI's protocol."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from mlx_mixtral.cli.console import note, one_line
from mlx_mixtral.cli.fields import takes
from mlx_mixtral.cli.serve.options import ServeOptions
from mlx_mixtral.cli.several import follow_leader, own_group, refuse_in_group
from mlx_mixtral.errors import MissingDependencyError, MixtralError, TokenizerError
from mlx_mixtral.installing import how_to_install

if TYPE_CHECKING:
    from mlx_mixtral import Mixtral
    from mlx_mixtral.server.serving import ModelServer

__all__ = ["serve"]

WANTED_FILES = 4096


@click.command()
@takes(ServeOptions)
def serve(given: ServeOptions) -> None:
    """Serve MODEL, a folder or a hub repository, to programs that use the OpenAI or the Anthropic API.

    Only programs on this machine can reach it, unless --host says otherwise. Ctrl-C or SIGTERM stops it, after open requests
    have had --grace seconds to finish.
    """
    if given.idle_unload is not None:
        refuse_in_group("--idle-unload", "leave it out: the others end when the first unloads its model")
    follow_leader(given.model, given.loading)
    # Here, where Ctrl-C acts while others are waited for; from now on they end when this machine does.
    own_group()
    try:
        from mlx_mixtral.server.prefixes import widen_prefixes
        from mlx_mixtral.server.serving import ModelServer
    except ImportError as error:
        raise MissingDependencyError(
            f"serve needs the package {error.name}: {how_to_install('starlette', 'server')}"
        ) from None

    from mlx_mixtral import load
    from mlx_mixtral.cli.adapters import fetch_adapters
    from mlx_mixtral.cli.load import note_loaded
    from mlx_mixtral.cli.progress import byte_progress, fetch
    from mlx_mixtral.distributed.deadline import end_process

    options = given.server()
    _ = given.loading.overrides.checked
    folder = fetch(given.model, revision=given.loading.revision)
    loading = replace(given.loading, adapters=fetch_adapters(given.loading.adapters))
    is_first = True

    def loaded() -> Mixtral:
        # The bar is for whoever waits at the terminal; later loads happen while the log is written.
        nonlocal is_first
        with byte_progress("loading") if is_first else contextlib.nullcontext() as show:
            is_first = False
            model = load(
                folder,
                progress=None if show is None else lambda at: show(at.done_bytes, at.total_bytes),
                chat_template=given.chat_template,
                device=loading.device,
                group=own_group(),
                **loading.arguments(),
            )
        if given.loading.prefix_cache is None:
            widen_prefixes(model.engine)
        return model

    _raise_file_limit()
    server = ModelServer(loaded, options)
    server.bind()
    model = server.start()
    note_loaded(model)
    with contextlib.suppress(TokenizerError):
        if chat_note := model.tokenizer.chat_note:
            note(f"note: {one_line(chat_note)}")
    for line in _facts(server, model):
        note(line)
    del model
    if server.run():
        if server.engine.group_error is not None:
            note(f"error: {one_line(server.engine.group_error)}")
            # At once: threads of MLX may wait for machines that are gone.
            end_process("", 1)
        raise MixtralError("the engine failed too often; the lines above say why")
    note("the server has ended")


def _facts(server: ModelServer, model: Mixtral) -> Iterator[str]:
    """What there is to know before the first request."""
    from mlx_mixtral.sizes import format_bytes

    options, served = server.options, server.service.served
    plan = model.engine.plan
    experts = "" if plan.residency is None else ", other experts read from disk"
    yield (
        f"{one_line(served.name)}: {format_bytes(model.residency.resident_bytes)} of weights in memory{experts}; context "
        f"{served.context_tokens} tokens, up to {server.engine.rows} answers at once, {options.queue} waiting"
    )
    if served.adapters:
        sizes = (f"{name} ({format_bytes(model.adapters[name].nbytes)})" for name in served.adapters)
        yield f"adapters, by their names in requests: {', '.join(sizes)}"
    yield f"chat format {served.tokenizer.chat_format}, tools {server.service.chat.name}"
    key = "with a key" if options.api_keys else "without a key"
    if options.has_page:
        yield f"a page to talk with it: {server.url}/"
    yield f"listening at {server.url}/v1 {key}; Ctrl-C ends it"


def _raise_file_limit() -> None:
    """Each connection is a file, and macOS allows a process 256."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
