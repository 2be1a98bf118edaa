"""What the package says where MLX cannot run: recorded machines, and real interpreters with MLX hidden from them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_mixtral
from mlx_mixtral.machine.platforms import backend_problem

ROOT = Path(mlx_mixtral.__file__).parent.parent


@pytest.mark.parametrize(
    ("system", "machine", "release"),
    [
        ("Darwin", "arm64", "14.0"),
        ("Darwin", "arm64", "14"),
        ("Darwin", "arm64", "14.6.1"),
        ("Darwin", "arm64", "15.5"),
        ("Darwin", "arm64", "26.0"),
        ("Darwin", "arm64", ""),  # some builds of Python do not tell
        ("Linux", "x86_64", ""),
        ("Linux", "aarch64", ""),
    ],
)
def test_nothing_speaks_against_machines_mlx_supports(system: str, machine: str, release: str) -> None:
    assert backend_problem(system, machine, release, has_backend=True) is None


def test_a_python_under_rosetta_is_told_to_go_native_even_with_mlx_there() -> None:
    # platform.machine() of an x86_64 Python on Apple silicon.
    for has_backend in (True, False):
        problem = backend_problem("Darwin", "x86_64", "14.5", has_backend=has_backend)
        assert problem is not None
        assert "Rosetta" in problem
        assert "arm64" in problem


@pytest.mark.parametrize("release", ["13.7.1", "12.0", "11.6", "10.16", "13"])
def test_an_old_macos_is_told_which_one_it_needs(release: str) -> None:
    problem = backend_problem("Darwin", "arm64", release, has_backend=True)
    assert problem == f"macOS {release} is too old for MLX; it needs macOS 14 or later"


def test_linux_without_a_backend_is_told_both_extras() -> None:
    problem = backend_problem("Linux", "x86_64", "", has_backend=False)
    assert problem is not None
    assert "mlx-mixtral[cpu]" in problem
    assert "mlx-mixtral[cuda]" in problem


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_elsewhere_a_missing_mlx_is_named(system: str) -> None:
    assert backend_problem(system, "arm64", "15.0", has_backend=False) == "MLX is not installed: pip install mlx"


def test_every_problem_is_one_line() -> None:
    for machine in (
        ("Darwin", "x86_64", "15.0"),
        ("Darwin", "arm64", "12.0"),
        ("Darwin", "arm64", "15.0"),
        ("Linux", "x86_64", ""),
    ):
        problem = backend_problem(*machine, has_backend=False)
        assert problem
        assert "\n" not in problem


def test_this_machine_runs_mlx() -> None:
    assert backend_problem() is None


HIDE_ALL = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "mlx" or name.startswith("mlx."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""
# As `pip install mlx` leaves it on Linux: the Python part is there, the library of a backend is not.
HIDE_LIBRARY = """
import pathlib
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self, **options: self.name != "libmlx.so" and exists(self, **options)
"""


def _python(tmp_path: Path, hiding: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter in which ``hiding`` ran before anything else."""
    (tmp_path / "sitecustomize.py").write_text(hiding, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


HIDINGS = [
    pytest.param(HIDE_ALL, id="no mlx"),
    pytest.param(
        HIDE_LIBRARY,
        id="no backend library",
        marks=pytest.mark.skipif(sys.platform != "linux", reason="only on Linux is the library a wheel of its own"),
    ),
]


@pytest.mark.parametrize("hiding", HIDINGS)
def test_importing_without_mlx_is_an_import_error_that_says_what_to_install(tmp_path: Path, hiding: str) -> None:
    script = (
        "try:\n    import mlx_mixtral\n"
        "except ImportError as error:\n"
        "    print(type(error).__module__, type(error).__name__)\n    print(error)\n"
    )
    done = _python(tmp_path, hiding, "-c", script)
    assert done.returncode == 0, done.stderr
    kind, message = done.stdout.splitlines()
    assert kind == "mlx_mixtral.errors UnsupportedPlatformError"
    assert message == backend_problem(has_backend=False)


@pytest.mark.parametrize("hiding", HIDINGS)
@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "model", "-p", "x"], ["generate", "m", "-p", "--version"]]
)
def test_the_program_without_mlx_says_one_line_and_exits_with_1(
    tmp_path: Path, hiding: str, arguments: list[str]
) -> None:
    done = _python(tmp_path, hiding, "-m", "mlx_mixtral", *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [f"error: {backend_problem(has_backend=False)}"]


@pytest.mark.parametrize("flag", ["-V", "--version", "version"])
def test_the_version_is_told_without_mlx(tmp_path: Path, flag: str) -> None:
    done = _python(tmp_path, HIDE_ALL, "-m", "mlx_mixtral", flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"mlx-mixtral {mlx_mixtral.__version__}\n"


def test_the_installed_script_without_mlx_says_the_same_line(tmp_path: Path) -> None:
    script = tmp_path / "mlx-mixtral"
    script.write_text("from mlx_mixtral.cli import main\nmain()\n", encoding="utf-8")
    done = _python(tmp_path, HIDE_ALL, str(script), "--help")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"error: {backend_problem(has_backend=False)}"]


def test_the_hiding_is_what_makes_the_difference(tmp_path: Path) -> None:
    done = _python(tmp_path, "", "-c", "import mlx_mixtral; print('imported')")
    assert (done.returncode, done.stdout) == (0, "imported\n"), done.stderr
