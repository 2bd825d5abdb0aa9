"""scripts/venv.sh, demo.sh, test.sh and .ci/run, with a stand-in for Python that only writes down how it is called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("scripts/venv.sh", "scripts/demo.sh", "scripts/test.sh", ".ci/run")
TOOLS = ("bash", "dirname", "cat", "cp", "mkdir", "rm", "env")  # what the scripts and the stand-in may use

STAND_IN = """#!/bin/sh
case "$1 $2" in
"-c "*) exit ${TOO_OLD:-0} ;;
"--version "*) echo Python 3.13.0 ;;
"-m venv") [ -z "$NO_VENV" ] || { echo 'ensurepip is not available'; exit 1; }
    mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && echo venv >>"$LOG" ;;
"-m pip") [ "$3" = --version ] || { echo "$*" >>"$LOG"; exit ${PIP_FAILS:-0}; } ;;
*) echo "$*" >>"$LOG" ;;
esac
"""


class Project:
    """A copy of the scripts in a folder with a blank in its name, and a PATH that holds the stand-in alone."""

    def __init__(self, folder: Path) -> None:
        self.root, self.log = folder / "my project", folder / "log"
        for name in SCRIPTS:
            target = self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
        (self.root / "pyproject.toml").write_text("[project]\n")
        self.path = folder / "bin"
        self.path.mkdir()
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found is not None
            (self.path / tool).symlink_to(found)

    def offer(self, name: str) -> None:
        python = self.path / name
        python.write_text(STAND_IN)
        python.chmod(0o755)

    def run(self, name: str, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.root / name), *argv],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=self.elsewhere,
            env={"PATH": str(self.path), "LOG": str(self.log), **environment},
        )

    def calls(self) -> list[str]:
        """What the stand-in was asked since the last time."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def install(project: Project, extra: str = "") -> str:
    return f"-m pip install --quiet --disable-pip-version-check -e {project.root}{extra}"


def test_scripts_may_be_executed_and_parse() -> None:
    for name in SCRIPTS:
        assert os.access(ROOT / name, os.X_OK), name
        assert subprocess.run(["bash", "-n", str(ROOT / name)], check=False).returncode == 0


def test_the_demo_sets_up_once_and_shows_what_it_runs(project: Project) -> None:
    project.offer("python3.13")
    demo = "-m mlx_moecache.generate --slots 30 --prompt Tell me a story about a little robot and a garden."
    done = project.run("scripts/demo.sh")
    assert (done.returncode, done.stdout) == (0, "")
    assert project.calls() == ["venv", install(project), demo]
    assert done.stderr.splitlines()[-1] == (
        '+ python -m mlx_moecache.generate --slots 30 --prompt "Tell me a story about a little robot and a garden."'
    )
    again = project.run("scripts/demo.sh", "--temp", "0.8", "--system-prompt", "be brief")
    assert project.calls() == [f"{demo} --temp 0.8 --system-prompt be brief"]
    assert again.stderr.endswith('garden." --temp 0.8 --system-prompt be\\ brief\n')
    assert list(project.elsewhere.iterdir()) == []


def test_a_memory_budget_takes_the_place_of_the_demos_slots(project: Project) -> None:
    project.offer("python3")
    for flags in (["--memory", "20MB"], ["--memory=20MB"]):
        project.run("scripts/demo.sh", *flags)
        call = project.calls()[-1]
        assert "--slots" not in call and call.endswith(" ".join(flags))


def test_checks_install_again_when_the_project_changed_or_moved(project: Project) -> None:
    project.offer("python3.11")
    checks = ["-m ruff check .", "-m mypy", "-m pytest -n 2 --dist loadfile -k name"]
    project.run("scripts/demo.sh")
    project.calls()
    assert project.run("scripts/test.sh", "-k", "name").returncode == 0
    assert project.calls() == [install(project, "[dev]"), *checks]
    assert project.run(".ci/run", "-k", "name").returncode == 0
    assert project.calls() == checks
    project.run("scripts/demo.sh")
    assert len(project.calls()) == 1, "what the tests need includes what the demo needs"
    (project.root / "pyproject.toml").write_text("[project]\nname = 'new'\n")
    project.run("scripts/test.sh")
    assert project.calls()[0] == install(project, "[dev]")
    project.root = project.root.rename(project.root.with_name("moved"))
    project.run("scripts/test.sh")
    assert project.calls()[0] == install(project, "[dev]")


def test_a_failed_installation_is_tried_again(project: Project) -> None:
    project.offer("python3.12")
    done = project.run("scripts/test.sh", PIP_FAILS="1")
    assert done.returncode == 2 and done.stderr.endswith("run the same command again\n")
    assert project.calls() == ["venv", install(project, "[dev]")]
    project.run("scripts/test.sh")
    assert project.calls()[0] == install(project, "[dev]")


def test_without_a_new_enough_python_the_message_says_so(project: Project) -> None:
    for environment in ({}, {"TOO_OLD": "1"}):
        done = project.run("scripts/demo.sh", **environment)
        assert done.returncode == 2
        assert done.stderr.startswith("error: no Python 3.11 or newer found; ")
        project.offer("python3")
    assert not (project.root / ".venv").exists()


def test_without_the_venv_module_the_message_says_what_to_install(project: Project) -> None:
    project.offer("python3")
    done = project.run("scripts/test.sh", NO_VENV="1")
    assert done.returncode == 2
    assert "error: python3 cannot make a virtual environment; on Debian and Ubuntu: " in done.stderr
    assert not (project.root / ".venv").exists()
