"""`mlx_moecache simulate`: the table, the JSON object, pipes and wrong input."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from made_traces import scored

from mlx_moecache.simulate import main
from mlx_moecache.study.simulator import replay_layer

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*argv: str | Path) -> tuple[int, str, str]:
        code = main([str(a) for a in argv])
        return (code, *capsys.readouterr())

    return run


def test_the_table_says_what_the_trace_is_and_marks_what_is_approximate(folder: Path, command: Command) -> None:
    trace = scored(folder, [6, *[1] * 40])
    code, out, err = command(
        trace.path, "--slots", "5,7", "--routing", "original", "--routing", "cache-prior:strength=0.2,j=1"
    )
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:4] == [
        "tiny: 2 MoE layers, 10 experts, 3 per token",
        "40 tokens of decode in 1 sequence, recorded with original routing",
        "",
        "original",
    ]
    assert lines[4].split()[:3] == ["slots", "eviction", "miss"]
    titles = [line for line in lines if line and not line.startswith(" ")]
    assert "~ cache-prior:strength=0.2,j=1" in titles
    assert "~ an approximation: other routes would have led to other scores" in titles
    rows = [line.split()[:2] for line in lines if line.startswith("  ") and "slots" not in line]
    exact = [[s, e] for s, e in itertools.product("57", ["lru", "lfu", "decay", "lfru", "belady"])]
    assert rows == exact + [row for row in exact if row[1] != "belady"]
    assert "tok/s" not in out and max(map(len, lines)) <= 79


def test_json_holds_the_same_figures_and_those_of_prefill(folder: Path, command: Command) -> None:
    trace = scored(folder, [6, *[1] * 40])
    code, out, err = command(trace.path, "--json", "--slots", "5", "--eviction", "lru", "--flash", "1MB/s")
    assert (code, err, out.count("\n")) == (0, "", 1)
    found = json.loads(out)
    (result,) = found["results"]
    counts = [replay_layer(x, 5, "lru", {0: []}) for x in trace.layers]
    assert result["exact"] and not result["bound"] and result["routing"] == "original"
    for phase in ("prefill", "decode"):
        assert result[phase]["misses"] == sum(getattr(c, phase).misses for c in counts)
    read = sum(c.decode.loads * x.shape.bytes_per_expert for c, x in zip(counts, trace.layers, strict=True))
    assert result["decode"]["bytes_per_token"] == read / 40
    assert result["decode"]["ms_per_token"] == pytest.approx(1000 * read / 40 / 1e6)
    assert found["trace"]["tokens"] == {"prefill": 6, "decode": 40}


def test_a_table_with_times_says_if_they_are_those_of_the_reads_alone(folder: Path, command: Command) -> None:
    path = scored(folder, [1] * 9).path
    alone = "times are those of the reads alone"
    assert alone in command(path, "--flash", "2GB/s")[1]
    code, out, _ = command(path, "--flash", "500MiB/s", "--compute-ms", "8", "--latency", "0.1ms")
    assert code == 0 and alone not in out and "tok/s" in out


def test_a_trace_of_prefill_alone_is_shown_as_such(folder: Path, command: Command) -> None:
    code, out, _ = command(scored(folder, [30]).path, "--eviction", "lru")
    assert code == 0 and "\n30 tokens of prefill in 1 sequence" in out


def test_a_shared_pool_is_named_as_what_the_engine_does_not_have(folder: Path, command: Command) -> None:
    code, out, _ = command(scored(folder, [1] * 20).path, "--shared-pool", "--slots", "5")
    assert code == 0
    assert "one pool for all layers, of slots x layers experts; this engine has a cache per layer" in out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("  ")][1:] == ["lru", "least-stale"]


def test_a_cut_off_trace_is_replayed_with_a_note_on_stderr(folder: Path, tmp_path: Path, command: Command) -> None:
    cut = tmp_path / "cut.trace"
    cut.write_bytes(scored(folder, [1] * 9).path.read_bytes()[:-3])
    code, out, err = command(cut)
    assert code == 0 and "\n9 tokens" in out
    assert err.startswith("note: left out the last ") and err.count("\n") == 1
    assert "left out the last" in json.loads(command(cut, "--json")[1])["trace"]["note"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--slots", "2"], "slots must be from 3, the experts per token, to all 10 of a layer, not 2"),
        (["--slots", "11"], "slots must be from 3, the experts per token, to all 10 of a layer, not 11"),
        (["--slots", "5,x"], "--slots: needs a whole number, not 'x'"),
        (["--slots", "0"], "--slots: must be at least 1, not 0"),
        (["--eviction", "fifo"], "unknown eviction policy 'fifo' (choose lru, lfu, decay, lfru, belady, belady-paper)"),
        (["--eviction", "decay:2"], "must be above 0 and at most 1, not '2'"),
        (["--routing", "magic"], "unknown routing 'magic'"),
        (["--routing", "price", "--eviction", "belady"], "belady is the bound of original routing only"),
        (["--shared-pool", "--eviction", "lfu"], "a shared pool has no policy 'lfu' (choose lru, least-stale)"),
        (["--shared-pool", "--routing", "price"], "--shared-pool replays original routing from an empty pool, so "),
        (["--shared-pool", "--initial", "warm"], "so --initial has no use; leave it out"),
        (["--initial", "full"], "--initial: unknown value 'full' (choose empty, random, warm)"),
        (["--flash", "fast"], "--flash: needs a speed such as 2GB/s or 500MB/s, not 'fast'"),
        (["--flash", "2GB"], "--flash: needs a speed such as 2GB/s or 500MB/s, not '2GB'"),
        (["--flash", "0GB/s"], "--flash: needs a speed such as 2GB/s or 500MB/s, not '0GB/s'"),
        (["--flash", "1GB/s", "--latency", "5"], "--latency: needs a time such as 100us or 0.2ms, not '5'"),
        (["--compute-ms", "5"], "--compute-ms is part of the predicted time, which also needs --flash"),
        (["--compute-ms", "-1"], "--compute-ms"),
        (["more.trace"], "unexpected argument 'more.trace'"),
        (["--slot", "5", "--sots", "5"], "unknown flag --sots, did you mean --slots?"),
    ],
)
def test_wrong_input_is_one_line(folder: Path, command: Command, argv: list[str], message: str) -> None:
    code, out, err = command(scored(folder, [1, 1]).path, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.trace", "no trace at {}; record one with mlx_moecache generate --trace FILE"),
        ("", "no trace at {}; record one"),
        ("notes.txt", "{} is not a trace; give a file that was recorded with --trace"),
    ],
)
def test_what_is_no_trace_is_one_line(tmp_path: Path, command: Command, name: str, message: str) -> None:
    (tmp_path / "notes.txt").write_text("buy milk")
    code, out, err = command(tmp_path / name)
    assert (code, out) == (2, "") and message.format(tmp_path / name) in err and err.count("\n") == 1


def test_the_real_command_runs_in_a_pipe_that_nobody_reads(folder: Path) -> None:
    path = scored(folder, [1] * 30).path
    line = f"{sys.executable} -m mlx_moecache.simulate {path} --eviction lru | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 141) and done.stderr == "" and done.stdout.startswith("tiny: 2 MoE layers")
