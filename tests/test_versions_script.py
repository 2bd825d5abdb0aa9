"""scripts/test_versions.sh, with a stand-in for Python that only writes down how it is called."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_setup_scripts import ROOT, STAND_IN, Project, install

# The one thing that runs for real is the reading of pyproject.toml, whose program comes on standard input.
ANSWERS = f"""#!/bin/sh
case "$0 $1 $2 $3" in
*"/python - "*) exec '{sys.executable}' - ;;
*oldest*"-m pytest"*) echo "oldest: $*" >>"$LOG"; exit ${{OLDEST_FAILS:-0}} ;;
*newest*"-m pytest"*) echo "newest: $*" >>"$LOG"; exit 0 ;;
esac
"""
PYPROJECT = """
[project]
dependencies = [
    "mlx>=0.32.2,<0.33",
    "mlx-lm>=0.32.0,<0.33; sys_platform == 'plan9'",
    "mlx-lm[cpu]>=0.32.1,<0.33; sys_platform != 'plan9'",
    "numpy>=1.26",
]
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path)
    shutil.copy2(ROOT / "scripts" / "test_versions.sh", project.root / "scripts")
    (project.root / "pyproject.toml").write_text(PYPROJECT)
    python = project.path / "python3.13"
    python.write_text(ANSWERS + STAND_IN)
    python.chmod(0o755)
    return project


def test_the_script_parses() -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / "scripts" / "test_versions.sh")], check=False).returncode == 0


def test_both_ends_of_the_range_get_an_environment_that_is_kept(project: Project) -> None:
    done = project.run("scripts/test_versions.sh", "-k", "name")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    dev = install(project, "[dev]")
    oldest, newest = f"{dev} mlx==0.32.2 mlx-lm[cpu]==0.32.1", f"{dev} --upgrade mlx mlx-lm"
    tests = ["oldest: -m pytest -k name", "newest: -m pytest -k name"]
    calls = [c for c in project.calls() if not c.startswith("-c")]
    assert calls == ["venv", dev, "venv", oldest, "venv", newest, *tests]
    assert "== oldest: " in done.stderr and done.stderr.count(": passed") == 2
    assert (project.root / ".venv-versions" / ".gitignore").read_text() == "*\n"
    project.run("scripts/test_versions.sh")
    assert "venv" not in project.calls()


def test_one_end_alone(project: Project) -> None:
    assert project.run("scripts/test_versions.sh", "newest", "tests/test_seam.py").returncode == 0
    assert project.calls()[-1] == "newest: -m pytest tests/test_seam.py"
    assert not (project.root / ".venv-versions" / "oldest").exists()


def test_a_failure_at_one_end_does_not_hide_the_other_and_decides_the_exit_code(project: Project) -> None:
    done = project.run("scripts/test_versions.sh", OLDEST_FAILS="1")
    assert done.returncode == 1
    assert project.calls()[-1] == "newest: -m pytest"
    assert [line.rsplit(": ", 1)[1] for line in done.stderr.splitlines()[-2:]] == ["FAILED", "passed"]


def test_no_test_runs_in_an_environment_that_could_not_be_made(project: Project) -> None:
    project.run("scripts/test.sh")
    project.calls()
    done = project.run("scripts/test_versions.sh", "oldest", PIP_FAILS="1")
    assert done.returncode == 2
    assert done.stderr.endswith("cannot make .venv-versions/oldest; check the network and run the same command again\n")
    assert not any("-m pytest" in call for call in project.calls())


def test_a_range_without_a_lower_end_is_an_error(project: Project) -> None:
    (project.root / "pyproject.toml").write_text(PYPROJECT.replace("mlx>=0.32.2,", "mlx"))
    done = project.run("scripts/test_versions.sh", "oldest")
    assert done.returncode == 2
    assert "should give mlx and mlx-lm one lower end (>=) each, but gives: ['mlx-lm[cpu]==0.32.1']\n" in done.stderr
