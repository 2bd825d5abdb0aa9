"""The console script: overview, version, unknown commands, and what it does not import."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import mlx_moecache
from mlx_moecache import cli

ROOT = Path(__file__).parent.parent


def python(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_a_bare_call_prints_every_command_with_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    for name, text in cli.COMMANDS.items():
        assert any(line.split(maxsplit=1) == [name, text] for line in out.splitlines())
    assert err == ""


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_a_module_with_parser_and_main(name: str) -> None:
    module = import_module(f"mlx_moecache.{name}")
    assert module.setup_arg_parser().prog == f"mlx_moecache {name}"
    assert callable(module.main)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mlx_moecache {mlx_moecache.__version__}\n"
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == mlx_moecache.__version__


@pytest.mark.skipif(sys.platform == "win32", reason="shells close streams in this way on POSIX systems")
def test_closed_standard_streams_do_not_matter() -> None:
    command = [sys.executable, "-m", "mlx_moecache", "info", "demo"]
    want = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *command], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, want.stdout, want.stderr)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["genrate"], "unknown command genrate, did you mean generate? (commands: "),
        (["xyz"], "unknown command xyz (commands: "),
        (["--versoin"], "unknown flag --versoin, did you mean --version?"),
        (["generate", "--promt", "x"], "unknown flag --promt, did you mean --prompt?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and part in err and err.count("\n") == 1


def test_overview_and_help_of_a_command_do_not_import_mlx() -> None:
    code = """
import sys
from mlx_moecache.cli import main
main([]), main(["generate", "--prompt", ""])
try:
    main(["generate", "-h"])
except SystemExit as e:
    assert e.code == 0
slow = [m for m in sys.modules if m.split(".")[0] in ("mlx", "mlx_lm", "numpy", "transformers")]
sys.exit(f"imported: {slow}" if slow else 0)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_python_m_runs_the_same_console_script() -> None:
    done = python("-m", "mlx_moecache")
    assert (done.returncode, done.stdout) == (0, cli.overview() + "\n")


@pytest.mark.parametrize("order", ["import mlx_moecache.generate", "from mlx_moecache import generate"])
def test_generate_is_the_function_whichever_is_imported_first(order: str) -> None:
    code = f"""
{order}
import mlx_moecache.generate
from mlx_moecache import generate
from mlx_moecache.errors import UsageError
assert callable(generate) and callable(mlx_moecache.generate)
try:
    generate(object(), None, [1, 2], max_tokens=1)
except UsageError as e:
    assert "no expert cache" in str(e)
else:
    raise AssertionError("generation.generate was not called")
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_the_callable_module_takes_what_the_function_takes() -> None:
    function = inspect.signature(import_module("mlx_moecache.generation").generate)
    module = inspect.signature(import_module("mlx_moecache.generate"))
    assert module == function
