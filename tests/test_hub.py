"""resolve_model: local folders without any network, repos through a fake hub on this machine.

huggingface_hub reads its environment when it is imported, so everything that talks to the fake hub runs in a
process of its own; one process may resolve several names.
"""

from __future__ import annotations

import ast
import errno
import fcntl
import importlib.util
import json
import os
import pty
import re
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_moecache.checkpoints import hub as hub_module
from mlx_moecache.checkpoints.hub import MODEL_FILES, _check_repo_id, resolve_model
from mlx_moecache.errors import HubError, UsageError

CHUNK = 10 * 1024 * 1024  # huggingface_hub writes and resumes in pieces of this size
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

WORKER = """
import json, sys
from mlx_moecache.errors import MoeCacheError
from mlx_moecache.checkpoints.hub import resolve_model

for line in sys.stdin:
    try:
        answer = {"folder": str(resolve_model(**json.loads(line)))}
    except MoeCacheError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
        print("error:", error, file=sys.stderr)
    print(json.dumps(answer))
"""


def shard(seed: int, size: int) -> bytes:
    """`size` bytes that repeat nowhere, so that a piece in the wrong place is noticed."""
    return b"".join((seed + i).to_bytes(8, "big") for i in range(0, size + 8, 8))[:size]


SHARDED: dict[str, bytes] = {
    "config.json": b'{"model_type": "qwen2_moe"}',
    "model.safetensors.index.json": b'{"weight_map": {}}',
    FIRST: shard(1 << 40, CHUNK + 300_000),
    SECOND: shard(2 << 40, 40_000),
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"eos_token": "<end>"}',
    "chat_template.jinja": b"{{ messages }}",
}
UNWANTED: dict[str, bytes] = {"README.md": b"# card", "pytorch_model.bin": b"old", "model.gguf": b"other"}
SMALL: dict[str, bytes] = {"config.json": b'{"small": 1}', "model.safetensors": b"weights"}
REPACKED: dict[str, bytes] = {
    **SMALL,
    "experts.safetensors.index.json": b'{"format": "mlx_moecache.experts"}',
    "experts-00001-of-00001.safetensors": shard(3 << 40, 50_000),
}
OTHER: dict[str, bytes] = {"config.json": b'{"small": 2}', "model.safetensors": b"other weights"}


@dataclass(frozen=True)
class Answer:
    folder: Path | None
    error: str | None
    message: str

    def files(self) -> dict[str, bytes]:
        assert self.folder is not None, self.message
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}

    def reason(self) -> str:
        """The message of a HubError, which has to be one line."""
        assert self.error == "HubError", (self.error, self.folder)
        assert "\n" not in self.message
        return self.message


@dataclass(frozen=True)
class Output:
    answers: list[Answer]
    stderr: str


def environment(endpoint: str, home: Path, **changes: str) -> dict[str, str]:
    """This process's environment without its own hub settings and proxies."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE", "TRANSFORMERS_"))}
    kept = {k: v for k, v in kept.items() if not k.lower().endswith("_proxy")}
    return {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **changes}


def request(name: str, **options: Any) -> dict[str, Any]:
    return {"path_or_repo": name, **options}


def read_answers(stdout: str) -> list[Answer]:
    replies = [json.loads(line) for line in stdout.splitlines()]
    return [Answer(Path(r["folder"]) if "folder" in r else None, r.get("error"), r.get("message", "")) for r in replies]


def resolve_all(env: dict[str, str], cwd: Path, *requests: dict[str, Any], before: str = "") -> Output:
    """Resolve the requests in one new process whose stderr is a pipe; `before` is code it runs first."""
    done = subprocess.run(
        [sys.executable, "-c", before + WORKER],
        input="".join(json.dumps(r) + "\n" for r in requests),
        env=env, cwd=cwd, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    answers = read_answers(done.stdout)
    assert len(answers) == len(requests), done.stderr
    return Output(answers, done.stderr)


def resolve(env: dict[str, str], cwd: Path, name: str, *, before: str = "", **options: Any) -> Answer:
    return resolve_all(env, cwd, request(name, **options), before=before).answers[0]


def resolve_on_terminal(env: dict[str, str], cwd: Path, name: str, **options: Any) -> Output:
    """The same with a terminal of 100 columns as stderr."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        env=env, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs, text=True,
    )  # fmt: skip
    os.close(theirs)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(request(name, **options)) + "\n")
    process.stdin.close()
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError as error:  # how Linux reports that the other side is closed
        assert error.errno == errno.EIO
    finally:
        os.close(ours)
    stdout = process.stdout.read()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    return Output(read_answers(stdout), shown.decode())


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "hf_home"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    repos = {
        "org/sharded": {"main": {**SHARDED, **UNWANTED}},
        "org/small": {"main": SMALL, "v2": OTHER},
    }
    with FakeHub(repos) as running:
        yield running


@pytest.fixture(scope="module")
def unused_endpoint() -> str:
    """An address where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def make_cache(home: Path, repo: str, files: dict[str, bytes]) -> Path:
    """A cached snapshot as older library versions left it: refs and a snapshot, no list of its files."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    store = home / "hub" / ("models--" + repo.replace("/", "--"))
    snapshot = store / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(commit)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)
    return snapshot


# Local folders and names: no network.


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        pytest.fail("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> Path:
    """An empty current folder, which is the home folder too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def make_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_a_local_folder_is_returned(here: Path) -> None:
    folder = make_folder(here / "a model")
    assert resolve_model(str(folder)) == folder


def test_the_tilde_stands_for_the_home_folder(here: Path) -> None:
    folder = make_folder(here / "models" / "demo")
    assert resolve_model("~/models/demo") == folder


def test_a_local_folder_wins_over_a_repo_of_the_same_name(here: Path) -> None:
    folder = make_folder(here / "org" / "name")
    assert resolve_model("org/name").resolve() == folder.resolve()


def test_a_folder_without_config_is_refused(here: Path) -> None:
    (here / "empty").mkdir()
    with pytest.raises(HubError, match=r"'empty' has no config\.json.*model\*\.safetensors"):
        resolve_model("empty")


def test_a_file_is_refused(here: Path) -> None:
    (here / "model.safetensors").write_bytes(b"")
    with pytest.raises(HubError, match="is not a folder"):
        resolve_model("model.safetensors")


def test_a_revision_with_a_local_folder_is_a_usage_error(here: Path) -> None:
    make_folder(here / "demo")
    with pytest.raises(UsageError, match=r"'v2'.*'demo'"):
        resolve_model("demo", revision="v2")


@pytest.mark.parametrize("revision", ["", "  "])
def test_an_empty_revision_is_a_usage_error(here: Path, revision: str) -> None:
    with pytest.raises(UsageError, match="revision is empty"):
        resolve_model("org/name", revision=revision)


@pytest.mark.parametrize("name", ["", " \t"])
def test_an_empty_name_is_refused(here: Path, name: str) -> None:
    with pytest.raises(HubError, match="empty"):
        resolve_model(name)


@pytest.mark.parametrize(
    "name",
    ["./demo", "../demo", ".hidden", "/no/dir", "~/demo", "~nobody0/demo", "a/b/c", "demo/", r"a\b"],
)
@pytest.mark.parametrize("revision", [None, "main"])
def test_a_missing_path_is_never_looked_up_on_the_hub(here: Path, name: str, revision: str | None) -> None:
    with pytest.raises(HubError, match="no such folder"):
        resolve_model(name, revision=revision)


def test_a_path_whose_first_part_exists_is_taken_as_a_path(here: Path) -> None:
    (here / "models").mkdir()
    with pytest.raises(HubError, match=r"no such folder: 'models/demo'.*'models' here.*revision"):
        resolve_model("models/demo")


def test_a_revision_makes_it_a_repo_even_if_a_folder_has_the_name_of_the_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = make_folder(tmp_path / "snapshot")
    (snapshot / "model.safetensors").write_bytes(b"")
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **_: {"org/name": snapshot}[repo])
    assert resolve_model("org/name", revision="main") == snapshot


@pytest.mark.parametrize(
    "name",
    ["two words", "org/na me", "café/x", "-x", "x.", "org./x", "a--b", "a..b", "x.git", "x" * 97, "a\0b"],
)
def test_a_name_that_can_be_no_repo_is_refused_with_the_rules(here: Path, name: str) -> None:
    with pytest.raises(HubError, match=r"neither a folder nor a Hugging Face repo id.*org/name.*96"):
        resolve_model(name)


SHORT_NAMES = st.text("aB0_-./é ", min_size=1, max_size=12)
LONG_NAMES = st.from_regex(r"[ab.]{94,98}(/[ab-]{94,98})?", fullmatch=True)


@settings(deadline=None)
@given(SHORT_NAMES | LONG_NAMES)
def test_the_rules_for_repo_ids_are_those_of_the_library(name: str) -> None:
    def accepts(check: Callable[[str], None], refusal: type[Exception]) -> bool:
        try:
            check(name)
        except refusal:
            return False
        return True

    assert accepts(_check_repo_id, HubError) == accepts(validate_repo_id, HFValidationError)


def test_the_files_fetched_are_those_of_mlx_lm() -> None:
    spec = importlib.util.find_spec("mlx_lm")
    assert spec is not None and spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0], "utils.py").read_text()
    patterns = [
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DEFAULT_ALLOW_PATTERNS"
    ]
    assert patterns == [list(MODEL_FILES)]


def test_a_local_folder_does_not_need_the_hub_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    spec = importlib.util.spec_from_file_location("fresh_hub", hub_module.__file__)
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    folder = make_folder(tmp_path / "demo")
    assert fresh.resolve_model(str(folder)) == folder


# Downloads.


def test_a_repo_is_downloaded_without_the_files_that_are_not_needed(hub: FakeHub, home: Path, tmp_path: Path) -> None:
    output = resolve_all(environment(hub.url, home), tmp_path, request("org/sharded"))
    assert output.answers[0].files() == SHARDED
    assert output.stderr == ""
    asked = {r.path.rsplit("/", 1)[-1] for r in hub.requests if not r.path.startswith("/api/")}
    assert asked == set(SHARDED)


def test_a_repacked_copy_comes_with_its_expert_shards(hub: FakeHub, home: Path, tmp_path: Path) -> None:
    hub.repos["org/repacked"] = {"main": {**REPACKED, **UNWANTED}}
    env = environment(hub.url, home)
    first = resolve(env, tmp_path, "org/repacked")
    assert first.files() == REPACKED
    hub.forget_requests()
    assert resolve(env, tmp_path, "org/repacked") == first and hub.downloads() == []
    assert resolve({**env, "HF_HUB_OFFLINE": "1"}, tmp_path, "org/repacked") == first


def test_expert_shards_are_left_where_no_manifest_says_what_they_are(hub: FakeHub, home: Path, tmp_path: Path) -> None:
    hub.repos["org/foreign"] = {"main": {**SMALL, "experts-00001-of-00001.safetensors": b"what is this"}}
    assert resolve(environment(hub.url, home), tmp_path, "org/foreign").files() == SMALL


def test_a_second_run_downloads_nothing(hub: FakeHub, home: Path, tmp_path: Path) -> None:
    env = environment(hub.url, home)
    first = resolve(env, tmp_path, "org/small")
    assert len(hub.downloads()) == len(SMALL)
    hub.forget_requests()
    assert resolve(env, tmp_path, "org/small") == first
    assert hub.downloads() == []


def test_a_revision_selects_other_content(hub: FakeHub, home: Path, tmp_path: Path) -> None:
    default, branch, commit = resolve_all(
        environment(hub.url, home),
        tmp_path,
        request("org/small"),
        request("org/small", revision="v2"),
        request("org/small", revision=hub.commit("org/small", "v2")),
    ).answers
    assert default.files() == SMALL
    assert branch.files() == commit.files() == OTHER


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """What the hub refuses to a caller without a token, all asked in one process; keyed by repo."""
    repos = {
        "org/small": {"main": SMALL},
        "org/gated": {"main": SMALL},
        "org/no-config": {"main": {"model.safetensors": b"", "tokenizer.json": b"{}"}},
        "org/gguf": {"main": {"config.json": b"{}", "model.gguf": b""}},
        "org/adapter": {"main": {"config.json": b"{}", "adapters.safetensors": b""}},
        **{f"org/status{status}": {"main": SMALL} for status in (403, 404, 429, 500)},
    }
    folder = tmp_path_factory.mktemp("refusals")
    with FakeHub(repos, gated={"org/gated"}) as hub:
        hub.failing = {f"org/status{status}": status for status in (403, 404, 429, 500)}
        asked = [request(repo) for repo in repos if repo != "org/small"]
        asked += [request("org/missing"), request("missing"), request("org/small", revision="nope")]
        output = resolve_all(environment(hub.url, folder / "home"), folder, *asked)
    return {a["path_or_repo"]: answer for a, answer in zip(asked, output.answers, strict=True)}


@pytest.mark.parametrize(
    ("repo", "expected"),
    [
        ("org/missing", "no folder 'org/missing' here.*no such repo.*spelling.*`hf auth login`"),
        ("missing", "no folder 'missing' here.*no such repo"),
        ("org/gated", "gated: accept the licence on the model page .*/org/gated.*`hf auth login`"),
        ("org/small", "has no revision 'nope': give a branch, a tag or a commit"),
        ("org/no-config", r"no config\.json: choose a repo"),
        ("org/gguf", r"no model\*\.safetensors files: choose a repo.*GGUF"),
        ("org/adapter", r"no model\*\.safetensors files: choose a repo"),
        ("org/status403", "403.*accept the licence on the model page .*`hf auth login`"),
        ("org/status404", "404.*HF_ENDPOINT"),
        ("org/status429", "429.*too many requests.*wait"),
        ("org/status500", "500.*trouble on the hub's side.*run the same command again"),
    ],
)
def test_a_refusal_says_what_is_wrong_and_what_to_do(refusals: dict[str, Answer], repo: str, expected: str) -> None:
    assert re.search(expected, refusals[repo].reason())


def test_refusals_with_a_token_are_told_apart(hub: FakeHub, home: Path, tmp_path: Path) -> None:
    hub.gated = {"org/small"}
    hub.rejected_tokens = {"hf_expired"}
    env = environment(hub.url, home)
    gated, missing = resolve_all(
        {**env, "HF_TOKEN": "hf_good"}, tmp_path, request("org/small"), request("org/missing")
    ).answers
    assert "is gated: accept the licence" in gated.reason()
    assert "no such repo" in missing.reason()
    assert any(r.token == "Bearer hf_good" for r in hub.requests)
    expired = resolve({**env, "HF_TOKEN": "hf_expired"}, tmp_path, "org/missing")
    assert re.search("token is wrong or expired.*`hf auth login`", expired.reason())


# Broken connections.


def test_a_download_that_is_cut_goes_on_where_it_stopped(hub: FakeHub, home: Path, tmp_path: Path) -> None:
    hub.cut_once(FIRST, after=CHUNK + 100_000)
    answer = resolve(environment(hub.url, home), tmp_path, "org/sharded")
    assert answer.files() == SHARDED
    assert [r.range for r in hub.downloads(FIRST)] == [None, f"bytes={CHUNK}-"]


def test_after_a_lost_connection_the_next_run_fetches_only_the_unfinished_file(
    hub: FakeHub, home: Path, tmp_path: Path
) -> None:
    env = environment(hub.url, home)
    hub.cut_once(FIRST, after=1000, reset=True)
    lost = resolve(env, tmp_path, "org/sharded")
    assert re.search("connection was lost.*run the same command again", lost.reason())
    offline = resolve({**env, "HF_HUB_OFFLINE": "1"}, tmp_path, "org/sharded")
    assert re.search("only partly in the local cache.*HF_HUB_OFFLINE", offline.reason())

    finished = {r.path.rsplit("/", 1)[-1] for r in hub.downloads()} - {FIRST}
    assert finished, "the small files should have come through before the large one broke"
    hub.forget_requests()
    assert resolve(env, tmp_path, "org/sharded").files() == SHARDED
    fetched = [r.path.rsplit("/", 1)[-1] for r in hub.downloads()]
    assert FIRST in fetched and not finished & set(fetched)


# Offline.


def test_offline_with_a_cache_folder_works(home: Path, tmp_path: Path, unused_endpoint: str) -> None:
    snapshot = make_cache(home, "org/small", SMALL)
    env = environment(unused_endpoint, home, HF_HUB_OFFLINE="1")
    assert resolve(env, tmp_path, "org/small").folder == snapshot


def test_without_a_connection_a_cache_folder_works(home: Path, tmp_path: Path, unused_endpoint: str) -> None:
    snapshot = make_cache(home, "org/small", SMALL)
    assert resolve(environment(unused_endpoint, home), tmp_path, "org/small").folder == snapshot


def test_offline_without_a_cache_is_explained(home: Path, tmp_path: Path, unused_endpoint: str) -> None:
    answer = resolve(environment(unused_endpoint, home, HF_HUB_OFFLINE="1"), tmp_path, "org/small")
    assert re.search("not in the local cache.*without HF_HUB_OFFLINE.*local model folder", answer.reason())


def test_an_unreachable_hub_is_explained(home: Path, tmp_path: Path, unused_endpoint: str) -> None:
    answer = resolve(environment(unused_endpoint, home), tmp_path, "org/small", revision="v2")
    expected = f"cannot reach {unused_endpoint}.*'v2' is not in the local cache.*network"
    assert re.search(expected, answer.reason())


# The local disk.

FULL_DISK = """
import errno, pathlib
real_open = pathlib.Path.open
def open_on_full_disk(path, *args, **options):
    file = real_open(path, *args, **options)
    if not path.name.endswith(".incomplete"):
        return file
    class Full:
        def __getattr__(self, name): return getattr(file, name)
        def __enter__(self): return self
        def __exit__(self, *_): file.close()
        def write(self, data): raise OSError(errno.ENOSPC, "No space left on device")
    return Full()
pathlib.Path.open = open_on_full_disk
"""


def test_a_full_disk_is_explained_and_leaves_nothing_behind(hub: FakeHub, home: Path, tmp_path: Path) -> None:
    env = environment(hub.url, home)
    answer = resolve(env, tmp_path, "org/small", before=FULL_DISK)
    assert re.search(f"disk is full.*{re.escape(str(home))}.*HF_HOME.*again", answer.reason())
    assert list(home.rglob("*.incomplete")) == []
    assert resolve(env, tmp_path, "org/small").files() == SMALL


def test_a_cache_folder_that_cannot_be_written_is_explained(hub: FakeHub, home: Path, tmp_path: Path) -> None:
    home.write_text("a file where the cache folder should be")
    answer = resolve(environment(hub.url, home), tmp_path, "org/small")
    assert re.search("cannot write to the cache folder .*HF_HOME", answer.reason())


# Errors that a small server does not produce.


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (json.JSONDecodeError("Expecting value", "<html>", 0), "does not answer like a Hugging Face hub"),
        (OSError("Consistency check failed: file should be of\nsize 9"), "the connection was lost"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
        (RuntimeError("xet:\n  no answer\n"), r"could not be downloaded \(xet: no answer\).*again"),
        (RuntimeError("x" * 5000), r"could not be downloaded \(x{157}\.\.\.\)"),
        (ValueError(), r"could not be downloaded \(ValueError\)"),
    ],
)
def test_any_other_failure_is_one_line_with_its_cause_attached(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: str
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise raised

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(HubError, match=expected) as caught:
        resolve_model("org/name")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is raised


def test_ctrl_c_is_not_turned_into_a_hub_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.snapshot_download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve_model("org/name")


# Progress.


def final_screen(shown: str) -> list[str]:
    """The lines with something on them after `shown` was written to a very wide terminal."""
    rows: dict[int, str] = {}
    row = column = 0
    for piece in re.findall(r"\x1b\[A|\r|\n|[^\x1b\r\n]+", shown):
        if piece == "\r":
            column = 0
        elif piece == "\n":
            row += 1
        elif piece == "\x1b[A":
            row -= 1
        else:
            line = rows.get(row, "").ljust(column)
            rows[row] = line[:column] + piece + line[column + len(piece) :]
            column += len(piece)
    return [rows[row].rstrip() for row in sorted(rows) if rows[row].strip()]


def test_progress_is_drawn_on_a_terminal_and_wiped_at_the_end(hub: FakeHub, home: Path, tmp_path: Path) -> None:
    output = resolve_on_terminal(environment(hub.url, home), tmp_path, "org/sharded")
    assert output.answers[0].files() == SHARDED
    assert "100%|" in output.stderr and "10.8MB" in output.stderr
    assert final_screen(output.stderr) == []


def test_after_a_failure_only_the_error_stays_on_the_terminal(hub: FakeHub, home: Path, tmp_path: Path) -> None:
    hub.cut_once(FIRST, after=1000, reset=True)
    output = resolve_on_terminal(environment(hub.url, home), tmp_path, "org/sharded")
    assert "%|" in output.stderr
    assert final_screen(output.stderr) == [f"error: {output.answers[0].reason()}"]


@pytest.mark.parametrize("setting", [{}, {"HF_HUB_DISABLE_PROGRESS_BARS": "0"}])
def test_without_a_terminal_nothing_is_drawn(hub: FakeHub, home: Path, tmp_path: Path, setting: dict[str, str]) -> None:
    output = resolve_all(environment(hub.url, home, **setting), tmp_path, request("org/small"))
    assert output.answers[0].files() == SMALL
    assert output.stderr == ""


def test_progress_off_draws_nothing_on_a_terminal(hub: FakeHub, home: Path, tmp_path: Path) -> None:
    output = resolve_on_terminal(environment(hub.url, home), tmp_path, "org/small", progress=False)
    assert output.answers[0].files() == SMALL
    assert output.stderr == ""


@pytest.mark.parametrize("disabled", [True, False])
def test_the_progress_setting_of_the_library_is_left_as_it_was(
    hub: FakeHub, home: Path, tmp_path: Path, disabled: bool
) -> None:
    code = f"""
import atexit
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
if {disabled}: disable_progress_bars()
atexit.register(lambda: open("setting", "w").write(str(are_progress_bars_disabled())))
"""
    resolve(environment(hub.url, home), tmp_path, "org/small", before=code, progress=False)
    assert (tmp_path / "setting").read_text() == str(disabled)
