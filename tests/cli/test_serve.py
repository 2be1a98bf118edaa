"""``serve``: what is refused before a model is loaded, and what is said when one is."""

from __future__ import annotations

import select
import signal
import time
from pathlib import Path

import httpx
import pytest

from mlx_mixtral.cli.serve.options import KEY_VARIABLE, ServeOptions, model_name

from .conftest import Invoke, Spawn, assert_one_error

PATIENCE_S = 60


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--host", "0.0.0.0"), ("--host", "--api-key-file", "--insecure")),
        (("--host", "::"), ("--host",)),
        (("--port", 70000), ("--port is 70000", "65535")),
        (("--rows", 0), ("--rows is 0",)),
        (("--queue", -1), ("--queue is -1",)),
        (("--queue-timeout", 0), ("--queue-timeout is 0",)),
        (("--max-tokens", 0), ("--max-tokens is 0",)),
        (("--max-body", "lots"), ("lots",)),
        (("--grace", -1), ("--grace is -1",)),
        (("--idle-unload", 0), ("--idle-unload is 0",)),
        (("--max-stall", 0), ("--max-stall is 0",)),
        (("--tls-cert", "cert.pem"), ("belong together",)),
        (("--tls-cert", "cert.pem", "--tls-key", "key.pem"), ("cannot be used",)),
        (("--cors-origin", "example.com"), ("https://example.com",)),
        (("--cors-origin", "https://example.com/path"), ("without a path",)),
        (("--api-key-file", "/nowhere/keys"), ("/nowhere/keys", "cannot be read")),
        (("--rope-scaling", "nonsense"), ("nonsense",)),
        (("--chat-template", "no-such-format"), ("no-such-format",)),
    ],
)
def test_what_cannot_be_is_refused_before_loading(
    invoke: Invoke, options: tuple[object, ...], parts: tuple[str, ...]
) -> None:
    result = invoke("serve", "/nowhere/model", *options)
    assert_one_error(result, *parts)
    assert "/nowhere/model" not in result.stderr


def test_a_key_file_may_have_comments_and_must_have_a_key(tmp_path: Path, invoke: Invoke) -> None:
    file = tmp_path / "keys"
    file.write_text("# for me\nfirst\n\n  second  \n")
    options = ServeOptions(model="a/b", api_key_file=str(file), host="0.0.0.0")
    assert options.server().api_keys == ("first", "second")
    file.write_text("# nobody\n\n")
    assert_one_error(invoke("serve", "model", "--api-key-file", file), "holds no key")


def test_a_key_of_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ServeOptions(model="a/b").server().api_keys == ()
    monkeypatch.setenv(KEY_VARIABLE, " from-the-environment ")
    assert ServeOptions(model="a/b", host="0.0.0.0").server().api_keys == ("from-the-environment",)


def test_embeddings_are_off_unless_it_is_said_how() -> None:
    assert ServeOptions(model="a/b").server().pooling is None
    assert ServeOptions(model="a/b", pooling="last").server().pooling == "last"


def test_it_can_be_told_to_serve_everybody() -> None:
    assert ServeOptions(model="a/b", host="0.0.0.0", insecure=True).server().api_keys == ()


def test_the_page_can_be_left_out() -> None:
    assert ServeOptions(model="a/b").server().has_page
    assert not ServeOptions(model="a/b", no_page=True).server().has_page


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("owner/model-4bit", "model-4bit"),
        ("owner/model@main", "model"),
        ("/models/mine/", "mine"),
        ("mine", "mine"),
    ],
)
def test_a_model_is_called_as_its_folder(source: str, name: str) -> None:
    assert model_name(source) == name


def test_no_model_is_one_error(invoke: Invoke, tmp_path: Path) -> None:
    assert_one_error(invoke("serve", tmp_path / "nothing", "--port", 0), "nothing")


def test_it_says_where_it_is_and_what_fits_and_ends_at_ctrl_c(spawn: Spawn, short: Path) -> None:
    process = spawn("serve", short, "--port", 0, "--alias", "mine", "--queue", 5, "--log-format", "json")
    assert process.stderr is not None
    said, end = b"", time.monotonic() + PATIENCE_S
    while b"Ctrl-C" not in said:
        assert time.monotonic() < end, said
        if select.select([process.stderr], [], [], 1)[0]:
            said += process.stderr.read1(10_000)  # type: ignore[attr-defined]
    text = said.decode()
    assert f"{short.name}: " in text
    assert "context 1024 tokens, up to 8 answers at once, 5 waiting" in text
    assert "without a key" in text
    assert f"a page to talk with it: {text.partition('listening at ')[2].split('/v1')[0]}/\n" in text
    url = text.partition("listening at ")[2].split()[0]
    names = [model["id"] for model in httpx.get(f"{url}/models", timeout=PATIENCE_S).json()["data"]]
    assert names == [short.name, "mine"]
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 0
    rest = process.stderr.read().decode()
    assert '"path": "/v1/models"' in rest
    assert "Traceback" not in rest
