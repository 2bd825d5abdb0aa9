"""`mlx_moecache repack`: what a person sees, on a terminal and in a pipe, when it works, stops or is refused."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_hub import FakeHub

from mlx_moecache.checkpoints.expert_major import MANIFEST_NAME, read_manifest
from mlx_moecache.demo import DEMO_MODEL
from mlx_moecache.repack import main

EXPERTS = "experts-00001-of-00001.safetensors"
# The command with a real Ctrl-C at the moment the second file is read back.
INTERRUPTED_RUN = """
import os, signal, sys
from mlx_moecache.checkpoints import repacking
from mlx_moecache.repack import main
real = repacking.hash_file
def hash_file(path, advance):
    if path.name.startswith("experts"):
        os.kill(os.getpid(), signal.SIGINT)
    return real(path, advance)
repacking.hash_file = hash_file
sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: object) -> Done:
        code = main([*map(str, argv)])
        return Done(code, *capsys.readouterr())

    return run


def python(*argv: object, **options: object) -> Done:
    done = subprocess.run(
        [sys.executable, *map(str, argv)], capture_output=True, text=True, check=False, timeout=120, **options
    )  # type: ignore[call-overload]
    return Done(done.returncode, done.stdout, done.stderr)


def allow_sigint() -> None:
    """Children of a shell's background job ignore SIGINT; the command under test must not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, repacked by the real command. Do not change it: it is shared."""
    out = tmp_path_factory.mktemp("copy") / "new" / "demo"
    done = python("-m", "mlx_moecache", "repack", "demo", out)
    assert (done.code, done.err) == (0, "")
    first, second = done.out.splitlines()
    assert re.fullmatch(
        rf"{out}: experts in 1 file \(9\.\d+ MB\), other tensors in 1 file \(2\.\d+ MB\), all checked by SHA-256", first
    )
    assert "mlx-lm itself cannot load it" in second
    return out


def test_generate_writes_the_same_reply_from_the_copy(copy: Path) -> None:
    flags = ["--slots", "20", "-m", "12", "--verbose", "F", "--exact", "-p", "Tell me a story about a fox."]
    replies = [python("-m", "mlx_moecache.generate", "--model", folder, *flags) for folder in (DEMO_MODEL, copy)]
    assert replies[0] == replies[1] and replies[0].code == 0 and len(replies[0].out) > 20


def test_the_same_command_again_checks_what_is_there_and_writes_nothing(copy: Path, command: Run) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    done = command(DEMO_MODEL, copy)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("kept from an earlier run: 2 of 2 files\n")
    assert {path.name: path.stat().st_mtime_ns for path in copy.iterdir()} == before


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(copy: Path, tmp_path: Path, command: Run) -> None:
    out = tmp_path / "out"
    done = python("-c", INTERRUPTED_RUN, "demo", out, preexec_fn=allow_sigint)
    assert (done.code, done.out) == (130, "")
    assert done.err == "interrupted: 1 of 2 files are finished; run the same command again to go on\n"
    manifest = read_manifest(out)
    assert manifest is not None and not manifest.is_complete
    assert not list(out.glob("*.partial")) and not (out / EXPERTS).exists()

    refused = command("--verify", out)
    assert refused.code == 2 and "unfinished" in refused.err
    done = command("demo", out)
    assert done.code == 0 and done.out.startswith("kept from an earlier run: 1 of 2 files\n")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in copy.iterdir()}


def test_verify_reads_everything_and_names_what_changed(copy: Path, tmp_path: Path, command: Run) -> None:
    assert command("--verify", copy) == Done(0, f"{copy}: all 2 files (11.5 MB) have their SHA-256\n", "")
    assert command("demo", copy, "--verify").code == 0
    out = Path(shutil.copytree(copy, tmp_path / "out"))
    with open(out / EXPERTS, "r+b") as file:
        file.seek(5_000_000)
        file.write(b"changed")
    done = command("--verify", out)
    assert (done.code, done.out) == (2, "") and done.err.count("\n") == 1
    assert f"{EXPERTS} missing or changed" in done.err and "repack again" in done.err
    done = command("demo", out)
    assert done.code == 0 and done.out.startswith(f"{EXPERTS} did not have its hash any more")
    assert command("--verify", out).code == 0


def on_terminal(argv: list[str], columns: int) -> tuple[int, str]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_moecache.repack", *argv],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    output = b""
    try:
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # how Linux says that the other side is closed
                break
            if not piece:
                break
            output += piece
        return process.wait(timeout=60), output.decode()
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.parametrize("columns", [100, 40])
def test_a_terminal_shows_progress_and_keeps_only_the_result(columns: int, tmp_path: Path) -> None:
    code, output = on_terminal(["demo", str(tmp_path / "out")], columns)
    assert code == 0
    assert "\rwriting:" in output
    *bars, last = output.split("\r\n")[0].split("\r")
    assert last.startswith(str(tmp_path / "out"))
    assert max(map(len, bars)) <= columns + 8  # a bar and the blanks of what it replaces


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "give the model and a folder for the copy"),
        (["demo"], "give the model and a folder for the copy"),
        (["demo", ""], "give the model and a folder for the copy"),
        (["--verify"], "--verify needs the folder of the copy"),
        (["--verify", "{tmp}"], "is not a folder made by mlx_moecache repack"),
        (["demo", "{tmp}/out", "more"], "unexpected argument 'more'"),
        (["demo", "{tmp}/out", "--verfy"], "did you mean --verify?"),
        (["{tmp}/none", "{tmp}/out"], "no such folder"),
        (["demo", "{demo}"], "is the model itself"),
        (["demo", "{tmp}"], "is not empty and was not made by mlx_moecache repack"),
        (["demo", "{tmp}/mine"], "cannot be used as a folder"),
        (["demo", "{tmp}/mine/out"], "cannot be used as a folder"),
        (["demo", "{tmp}/out", "--revision", "main"], "revision"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(argv: list[str], words: str, tmp_path: Path, command: Run) -> None:
    (tmp_path / "mine").write_text("mine")
    done = command(*(a.format(tmp=tmp_path, demo=DEMO_MODEL) for a in argv))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and words in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert not (DEMO_MODEL / MANIFEST_NAME).exists()


def test_a_full_disk_is_one_line_before_anything_is_written(
    tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1_000_000))
    done = command("demo", tmp_path / "out")
    assert done.code == 2 and re.search(r"needs 61\.\d MB, but only 1\.00 MB are free", done.err)
    assert not list(tmp_path.iterdir())


def test_a_model_of_the_hub_is_downloaded_and_named_as_it_was_asked_for(tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in DEMO_MODEL.iterdir() if path.is_file()}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE"))}
    with FakeHub({"org/tiny": {"main": files}}) as hub:
        env = {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "no_proxy": "*"}
        done = python("-m", "mlx_moecache.repack", "org/tiny", "out", env=env, cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None and manifest.source == "org/tiny" and manifest.is_complete
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
