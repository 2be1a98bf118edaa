"""Options of ``mlx-mixtral serve``, and what they become."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from mlx_mixtral.cli.fields import argument, flag, group, option
from mlx_mixtral.cli.options import LoadOptions, chat_template_option
from mlx_mixtral.cli.values import ModelName

if TYPE_CHECKING:
    from mlx_mixtral.server.options import ServerOptions

__all__ = ["KEY_VARIABLE", "ServeOptions"]

KEY_VARIABLE = "MLX_MIXTRAL_API_KEY"
MAX_ROWS = 64
MAX_KEY_FILE_BYTES = 64_000


@dataclass(frozen=True)
class ServeOptions:
    model: str = argument(type=ModelName())
    host: str = option(
        "--host NAME",
        "Address to listen on; an address that other machines can reach needs a key.",
        default="127.0.0.1",
    )
    port: int = option("--port N", "Port to listen on; 0 takes a free one.", default=8080)
    api_key_file: str | None = option(
        "--api-key-file FILE",
        f"Require one of the keys in this file, one per line.  [default: {KEY_VARIABLE}, if it is set]",
    )
    insecure: bool = flag("--insecure", "Listen beyond this machine without a key.")
    aliases: tuple[str, ...] = option(
        "--alias NAME",
        "Another name for the model in requests; repeatable.  [default: only the name of its folder]",
        multiple=True,
    )
    rows: int = option(
        "--rows N", "Generations at once, at most; fewer if --memory leaves too little KV cache.", default=8
    )
    queue: int = option("--queue N", "Generations that may wait; further requests get status 429.", default=64)
    queue_timeout: float = option("--queue-timeout SECONDS", "How long a generation may wait.", default=120.0)
    max_tokens: int = option("-n, --max-tokens", "Tokens of an answer if the request does not say.", default=2048)
    max_stall: float = option(
        "--max-stall SECONDS",
        "How long part of a prompt may hold up the answers in progress.",
        default=0.25,
    )
    tools: str = option(
        "--tools",
        "How the model writes tool calls; auto depends on its chat format.",
        type=click.Choice(("auto", "mistral", "hermes", "generic", "none")),
        default="auto",
    )
    pooling: Literal["mean", "last"] | None = option(
        "--pooling",
        "Answer /v1/embeddings: a text's vector is the mean of its last hidden states, or the last of them.  [default: off]",
        type=click.Choice(("mean", "last")),
    )
    cors_origins: tuple[str, ...] = option(
        "--cors-origin ORIGIN",
        "Allow web pages of this origin, such as https://example.com; repeatable.  [default: none]",
        multiple=True,
    )
    allowed_hosts: tuple[str, ...] = option(
        "--allow-host NAME",
        "Another host name that requests may use; repeatable.  [default: the loopback names]",
        multiple=True,
    )
    max_body: str = option("--max-body SIZE", "Size of a request body, at most.", default="2MB")
    idle_unload: float | None = option(
        "--idle-unload SECONDS",
        "Release the weights after this long without a request; the next request loads them.  [default: never]",
    )
    tls_cert: str | None = option("--tls-cert FILE", "Certificate chain (PEM), for HTTPS.")
    tls_key: str | None = option("--tls-key FILE", "Its private key (PEM).")
    grace: float = option(
        "--grace SECONDS", "Time that open requests get to finish when the server stops.", default=10.0
    )
    no_page: bool = flag("--no-page", "Do not serve the page at / for chatting in a browser.")
    log_format: str = option(
        "--log-format",
        "Format of the line that each request leaves on stderr.",
        type=click.Choice(("text", "json", "none")),
        default="text",
    )
    chat_template: str | None = chat_template_option()
    loading: LoadOptions = group(LoadOptions)

    def server(self) -> ServerOptions:
        """As the server takes them, checked before a model is loaded.

        Raises:
            InvalidRequestError: a value out of its range, a file that cannot be read, or a host that needs a key.
        """
        from mlx_mixtral.arguments import check_integer
        from mlx_mixtral.errors import InvalidRequestError
        from mlx_mixtral.server.guards import is_loopback
        from mlx_mixtral.server.options import ServerOptions
        from mlx_mixtral.sizes import parse_size

        check_integer("port", self.port, 0, 65535)
        check_integer("queue", self.queue, 0, 100_000)
        check_integer("max_tokens", self.max_tokens, 1)
        if self.rows is not None:
            check_integer("rows", self.rows, 1, MAX_ROWS)
        for name, least in (("queue_timeout", 1.0), ("grace", 0.0), ("idle_unload", 1.0), ("max_stall", 0.001)):
            value = getattr(self, name)
            if value is not None and not least <= value <= 10**7:
                raise InvalidRequestError(f"{name} is {value:g}; it must be a number of seconds of at least {least:g}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InvalidRequestError("tls_cert and tls_key belong together; give both")
        for origin in self.cors_origins:
            if origin != "*" and (not origin.startswith(("http://", "https://")) or origin.count("/") != 2):
                raise InvalidRequestError(
                    f"cors_origins holds {origin!r}; write https://example.com, without a path, or *"
                )
        self._check_names()
        keys = self._keys()
        if not keys and not is_loopback(self.host) and not self.insecure:
            raise InvalidRequestError(
                f"host {self.host} can be reached from other machines; give --api-key-file, or --insecure to serve everybody"
            )
        if self.tls_cert is not None and self.tls_key is not None:
            _check_certificate(self.tls_cert, self.tls_key)
        return ServerOptions(
            host=self.host,
            port=self.port,
            api_keys=keys,
            name=model_name(self.model),
            aliases=self.aliases,
            rows=self.rows,
            queue=self.queue,
            queue_timeout_s=self.queue_timeout,
            max_tokens=self.max_tokens,
            max_stall_s=self.max_stall,
            cors_origins=self.cors_origins,
            allowed_hosts=self.allowed_hosts,
            max_body_bytes=parse_size(self.max_body),
            idle_unload_s=self.idle_unload,
            tls_cert=self.tls_cert,
            tls_key=self.tls_key,
            grace_s=self.grace,
            tools=self.tools,
            has_page=not self.no_page,
            pooling=self.pooling,
            log_format=self.log_format,
        )

    def _check_names(self) -> None:
        """That a name stands for the model or for one adapter."""
        from mlx_mixtral.errors import InvalidRequestError

        own = (model_name(self.model), *self.aliases)
        for adapter in self.loading.adapters:
            if adapter.label in own:
                raise InvalidRequestError(
                    f"{adapter.label} is a name of the model and of an adapter; give the adapter another: "
                    f"--adapter NAME={adapter.path}"
                )

    def _keys(self) -> tuple[str, ...]:
        from mlx_mixtral.errors import InvalidRequestError

        if self.api_key_file is None:
            key = os.environ.get(KEY_VARIABLE, "").strip()
            return (key,) if key else ()
        try:
            with Path(self.api_key_file).expanduser().open("rb") as file:
                text = file.read(MAX_KEY_FILE_BYTES).decode("utf-8")
        except (OSError, UnicodeDecodeError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise InvalidRequestError(f"api_key_file {self.api_key_file!r} cannot be read: {reason}") from None
        keys = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
        if not keys:
            raise InvalidRequestError(f"api_key_file {self.api_key_file!r} holds no key; write one a line")
        return keys


def model_name(source: str) -> str:
    """What requests call a model: the last part of its folder or repository."""
    text = source.rstrip("/").partition("@")[0]
    return (Path(text).expanduser().resolve().name if text in (".", "..", "") else text.rpartition("/")[2]) or "mixtral"


def _check_certificate(cert: str, key: str) -> None:
    import ssl

    from mlx_mixtral.errors import InvalidRequestError

    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key)
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"tls_cert {cert!r} and tls_key {key!r} cannot be used: {error}") from None
