"""scripts/test_cuda.sh, with stand-ins for Python and for NVIDIA's driver: no GPU has run it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from test_setup_scripts import ROOT, STAND_IN, Project

# Asked for versions it knows one; the look for a GPU comes on standard input.
ANSWERS = """#!/bin/sh
case "$0 $1 $2 $3" in
*"/.venv-cuda/bin/python - "*) exit ${NO_GPU:-0} ;;
*"/.venv-cuda/bin/python -c "*) echo 0.32.4; exit 0 ;;
*"/.venv-cuda/bin/python -m pytest"*) echo "$*" >>"$LOG"; exit ${TESTS_FAIL:-0} ;;
*"/.venv-cuda/bin/python -m mlx_moecache.doctor"*) echo "$*" >>"$LOG"; exit ${DOCTOR_FAILS:-0} ;;
esac
"""
DOCTOR = "-m mlx_moecache.doctor"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path)
    shutil.copy2(ROOT / "scripts" / "test_cuda.sh", project.root / "scripts")
    for name, text in (("python3.13", ANSWERS + STAND_IN), ("nvidia-smi", "#!/bin/sh\n")):
        (project.path / name).write_text(text)
        (project.path / name).chmod(0o755)
    return project


def test_the_script_parses() -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / "scripts" / "test_cuda.sh")], check=False).returncode == 0


def test_the_cuda_library_is_installed_last_and_tests_and_doctor_run(project: Project) -> None:
    done = project.run("scripts/test_cuda.sh")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    calls = project.calls()
    quiet = "--quiet --disable-pip-version-check"
    assert calls[3:] == [
        f"-m pip install -e {project.root}[dev] {quiet}",
        f"-m pip install mlx[cuda13]==0.32.4 {quiet}",
        f"-m pip uninstall --yes mlx-cpu {quiet}",
        f"-m pip install --force-reinstall --no-deps mlx==0.32.4 mlx-cuda-13==0.32.4 {quiet}",
        calls[-2],
        DOCTOR,
    ]
    tests = calls[-2].split()[2:]
    assert len(tests) == 5 and all((ROOT / t).is_file() for t in tests)
    assert (project.root / ".venv-cuda" / ".gitignore").read_text() == "*\n"


def test_an_older_driver_and_other_tests_can_be_asked_for(project: Project) -> None:
    assert project.run("scripts/test_cuda.sh", "-k", "name", MLX_CUDA="12").returncode == 0
    calls = project.calls()
    assert calls[-2:] == ["-m pytest -k name", DOCTOR]
    assert any("mlx[cuda12]==0.32.4" in c for c in calls) and any("mlx-cuda-12==0.32.4" in c for c in calls)


@pytest.mark.parametrize("what", ["TESTS_FAIL", "DOCTOR_FAILS"])
def test_a_failure_decides_the_exit_code_and_hides_nothing(project: Project, what: str) -> None:
    done = project.run("scripts/test_cuda.sh", **{what: "1"})
    assert done.returncode == 1
    assert project.calls()[-1] == DOCTOR


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MLX_CUDA": "11"}, "error: MLX_CUDA must be 12 or 13, not '11'"),
        ({"NO_GPU": "1"}, "nvidia-smi shows which CUDA its driver is for (MLX_CUDA=12 or 13)"),
    ],
)
def test_what_cannot_run_says_why(project: Project, environment: dict[str, str], message: str) -> None:
    done = project.run("scripts/test_cuda.sh", **environment)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(message)
    assert DOCTOR not in project.calls()


def test_without_a_driver_the_cpu_is_named(project: Project) -> None:
    (project.path / "nvidia-smi").unlink()
    done = project.run("scripts/test_cuda.sh")
    assert done.returncode == 2
    assert done.stderr.endswith(
        "error: there is no NVIDIA driver here (no nvidia-smi); bash scripts/test.sh tests on the CPU\n"
    )


def test_without_a_network_nothing_runs(project: Project) -> None:
    project.run("scripts/demo.sh")
    project.calls()
    done = project.run("scripts/test_cuda.sh", PIP_FAILS="1")
    assert done.returncode == 2
    assert done.stderr.endswith("error: cannot make .venv-cuda; check the network and run the same command again\n")
    assert DOCTOR not in project.calls()
