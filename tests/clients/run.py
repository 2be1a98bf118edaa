"""Well-known clients against `mlx-mixtral serve` on the bundled checkpoint: python -m tests.clients.run [NAME …]

Each client has an environment of its own under build/clients, made at the first run from what the registries have then.
What is asked for can be had of any model: calls that are required, answers held to a schema. Nothing is judged by what it says.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CHECKPOINT = ROOT / "mlx_mixtral" / "demo" / "tiny-mixtral"
CHECKS = ("chat", "stream", "tools", "schema")
START_S, CHECKS_S, INSTALL_S = 120, 300, 1200


@dataclass(frozen=True)
class Client:
    """A program in ``python`` or ``node``, and the packages it needs; the first is the one that is tried."""

    name: str
    program: str
    packages: tuple[str, ...]
    checks: tuple[str, ...] = CHECKS

    @property
    def is_node(self) -> bool:
        return self.program.endswith(".mjs")


CLIENTS = (
    Client("openai", "with_openai.py", ("openai",)),
    Client("anthropic", "with_anthropic.py", ("anthropic",)),
    Client("langchain-openai", "with_langchain_openai.py", ("langchain-openai",)),
    Client("instructor", "with_instructor.py", ("instructor",)),
    Client("litellm", "with_litellm.py", ("litellm",)),
    Client("llm", "with_llm.py", ("llm",)),
    Client("pydantic-ai", "with_pydantic_ai.py", ("pydantic-ai-slim[openai]",)),
    Client("npm openai", "with_openai.mjs", ("openai", "zod")),
    Client("npm ai", "with_ai.mjs", ("ai", "@ai-sdk/openai-compatible", "zod")),
    Client("lm-eval", "with_lm_eval.py", ("lm-eval[api]",), ("choices", "passages", "generations")),
)


@dataclass(frozen=True)
class Outcome:
    """Of one client: its version, and for each check "" or why it failed."""

    client: str
    version: str
    reasons: dict[str, str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which clients: {', '.join(client.name for client in CLIENTS)}")
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "clients", help="where they are kept")
    parser.add_argument(
        "--url", help="of a server that runs already, such as http://127.0.0.1:8080; it must have --model"
    )
    parser.add_argument("--model", default=CHECKPOINT.name, help="the model's name there")
    given = parser.parse_args()
    if unknown := set(given.names) - {client.name for client in CLIENTS}:
        parser.error(f"there is no client {', '.join(sorted(unknown))}")
    chosen = [client for client in CLIENTS if not given.names or client.name in given.names]
    outcomes = []
    with contextlib.nullcontext(given.url) if given.url else serving() as url:
        for client in chosen:
            print(f"{client.name} …", file=sys.stderr, flush=True)
            outcomes.append(tried(client, given.environments, f"{url.rstrip('/')}/v1", given.model))
    print_table(outcomes)
    return int(any(any(outcome.reasons.values()) for outcome in outcomes))


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The address of a server on a free port of this machine."""
    command = [sys.executable, "-m", "mlx_mixtral", "serve", str(CHECKPOINT), "--port", "0", "--log-format", "none"]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'convert'}",
        "MLX_MIXTRAL_CONFIG": os.devnull,
    }
    environment.pop("MLX_MIXTRAL_API_KEY", None)
    server = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        for line in server.stderr:
            if found := re.search(r"listening at (\S+)/v1", line):
                break
        else:
            raise SystemExit("the server did not start")
        yield found[1]
    finally:
        server.terminate()
        server.wait(START_S)


def tried(client: Client, environments: Path, base_url: str, model: str) -> Outcome:
    """What became of one client's checks."""
    try:
        program, version = installed(client, environments)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return Outcome(client.name, "-", dict.fromkeys(client.checks, f"not installed: {said[-1] if said else error}"))
    reasons = dict.fromkeys(client.checks, "not reached")
    quiet = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    quiet.pop("PYTHONPATH", None)
    try:
        done = subprocess.run(
            [*program, base_url, model], capture_output=True, text=True, timeout=CHECKS_S, env=quiet, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(client.name, version, dict.fromkeys(client.checks, f"not over after {CHECKS_S} s"))
    for line in done.stdout.splitlines():
        if line.startswith('{"check"'):
            told = json.loads(line)
            reasons[told["check"]] = told.get("error", "")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        reasons = {name: last if why == "not reached" else why for name, why in reasons.items()}
    return Outcome(client.name, version, reasons)


def installed(client: Client, environments: Path) -> tuple[list[str], str]:
    """The command of a client's program in its environment, made where it is not there, and the package's version."""
    folder = environments / client.name.replace(" ", "-")
    done = folder / "installed"
    if client.is_node:
        npm = shutil.which("npm")
        if npm is None:
            raise OSError("Node.js with npm is needed")
        if not done.exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "package.json").write_text('{"private": true, "type": "module"}\n')
            quiet = ("--silent", "--no-audit", "--no-fund", "--no-update-notifier")
            _run([npm, "install", *quiet, *client.packages], folder)
            done.touch()
        # A module finds packages in the folders above its own.
        for path in (HERE / "node").glob("*.mjs"):
            shutil.copy(path, folder)
        package = json.loads(
            (folder / "node_modules" / client.packages[0] / "package.json").read_text(encoding="utf-8")
        )
        return ["node", str(folder / client.program)], package["version"]
    python = folder / "bin" / "python"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *client.packages], folder)
        done.touch()
    name = client.packages[0].partition("[")[0]
    version = _run([str(python), "-c", f"import importlib.metadata as m; print(m.version({name!r}))"], folder)
    return [str(python), str(HERE / "python" / client.program)], version.strip()


def _run(command: list[str], folder: Path) -> str:
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=INSTALL_S).stdout


def print_table(outcomes: list[Outcome]) -> None:
    """As Markdown, a table for clients with the same checks, and under them why checks failed."""
    print(f"{time.strftime('%Y-%m-%d')}, {CHECKPOINT.name}")
    for checks in dict.fromkeys(tuple(outcome.reasons) for outcome in outcomes):
        print("\n| client | version |", " | ".join(checks), "|")
        print("|---|---|" + "---|" * len(checks))
        for outcome in outcomes:
            if tuple(outcome.reasons) == checks:
                said = ["failed" if why else "passed" for why in outcome.reasons.values()]
                print(f"| {outcome.client} | {outcome.version} |", " | ".join(said), "|")
    print()
    for outcome in outcomes:
        for name, why in outcome.reasons.items():
            if why:
                print(f"{outcome.client}, {name}: {why}")


if __name__ == "__main__":
    sys.exit(main())
