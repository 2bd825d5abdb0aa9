"""`mlx_moecache sweep`: the grid and its order, one results file, interruption and continuation, what a person sees."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_moecache.errors import UsageError
from mlx_moecache.routing import Original, parse_routing
from mlx_moecache.study.result_metrics import Unit
from mlx_moecache.study.results import Results, Run, load
from mlx_moecache.study.sweep_grid import (
    GridRun,
    check,
    coarse_to_fine,
    default_families,
    default_slots,
    expand,
    make_grid,
    parse_slots,
)
from mlx_moecache.study.sweep_progress import SweepProgress
from mlx_moecache.sweep import main

TEXT = "Once upon a time there was a small fox who lived in a big forest. One day the fox met a bird. " * 12
K, EXPERTS = 4, 60  # of the demo model


# ---- the grid ----


def test_lists_of_values_become_families_over_the_longest_list() -> None:
    assert expand("cache-prior:strength=0.05,0.1,0.2,j=1,2") == [
        ("cache-prior:strength=0.05,j=1", "cache-prior:strength=0.1,j=1", "cache-prior:strength=0.2,j=1"),
        ("cache-prior:strength=0.05,j=2", "cache-prior:strength=0.1,j=2", "cache-prior:strength=0.2,j=2"),
    ]
    assert expand("max-rank:j=2,m=6") == [("max-rank:j=2,m=6",)]
    assert expand("original") == [("original",)]


@given(st.integers(0, 60))
def test_coarse_to_fine_visits_everything_once_the_middle_and_the_ends_first(n: int) -> None:
    levels = coarse_to_fine(n)
    assert sorted(i for level in levels for i in level) == list(range(n))
    assert all(levels)
    if n > 2:
        assert levels[:2] == [[n // 2], [0, n - 1]]
    done: list[int] = []
    for level in levels[:-1]:  # what is known after any level covers the range evenly
        done = sorted(done + level)
        gaps = [b - a for a, b in pairwise(done)]
        assert len(level) == 1 or max(gaps) <= 2 * min(gaps) + 1


@given(st.integers(2, 16).flatmap(lambda k: st.tuples(st.just(k), st.integers(k + 1, 512))))
def test_the_default_grid_fits_every_model_and_changes_routing(shape: tuple[int, int]) -> None:
    k, experts = shape
    names = set()
    for family in default_families(k=k, experts=experts):
        assert len(family) == len(set(family))
        for spec in family:
            strategy = parse_routing(spec, strength=None, top_j=None, k=k, slots=k, experts=experts)
            assert not strategy.is_exact
            names.add(strategy.name)
    assert names == {"pruning", "max-rank", "cumsum", "cache-prior", "mass-budget", "bounded-regret", "price"}
    assert all(k <= s <= experts for s in default_slots(k=k, experts=experts))


def test_every_combination_is_in_the_grid_once_and_original_routing_comes_first() -> None:
    families = [*expand("cache-prior:strength=0,0.05,0.1,0.2,0.4,j=2"), *expand("price:delta=0.01,0.02,0.04")]
    blocks = make_grid(families, [15, 30], ["lru", "lfu"], k=K, experts=EXPERTS)
    runs = [r for block in blocks for r in block]
    specs = [s for f in families for s in f if s != "cache-prior:strength=0,j=2"]  # that one is original routing
    wanted = {
        GridRun(parse_routing(s, strength=None, top_j=None, k=K, slots=n, experts=EXPERTS), n, e)
        for s, n, e in product(["original", *specs], [15, 30], ["lru", "lfu"])
    }
    assert len(runs) == len(set(runs)) and set(runs) == wanted
    assert blocks[0] == [GridRun(Original(), n, e) for n in (15, 30) for e in ("lru", "lfu")]
    middle = {r.strategy.spec for r in blocks[1]}
    assert middle == {"cache-prior:strength=0.1,j=2", "price:delta=0.02,j=1"}
    assert len(blocks[1]) == 8  # complete over slots and eviction policies


def test_slots_are_numbers_or_shares() -> None:
    assert parse_slots("15,50%, 30 ,45", 60) == [15, 30, 45]
    for text in ("", "x", "0", "61", "110%", "15;30", "1.5", "nan%"):
        with pytest.raises(UsageError, match="--slots"):
            parse_slots(text, 60)


@pytest.mark.parametrize(
    ("routing", "part"),
    [
        ("cache-prior:0.1,0.2", "belongs to no parameter"),
        ("cache-priors:strength=0.1", "unknown routing"),
        ("cache-prior:strength=0.1,x", "needs a number"),
        ("cache-prior:strength=0.1,", "needs a number"),
        ("price:strength=0.1", "unknown parameter"),
        ("price:delta=-1", "from 0 to 1"),
    ],
)
def test_strategies_that_no_model_could_use_are_refused(routing: str, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        check([routing], ["lru"])


# ---- the command ----


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Sweep = Callable[..., Done]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def sweep(text: Path, capsys: pytest.CaptureFixture[str]) -> Sweep:
    """Runs a small sweep on the demo model: 2 windows of 24 tokens, 15 slots unless other flags say so."""

    def run(*argv: object) -> Done:
        flags = ["--task", "text", "--data", str(text), "--window", "24", "--limit", "2", "--slots", "15"]
        code = main([*flags, *(str(a) for a in argv)])
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(sweep: Sweep) -> Callable[..., str]:
    def run(*argv: object) -> str:
        done = sweep(*argv)
        assert (done.code, done.out) == (2, ""), done
        assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
        return done.err

    return run


ROUTING = ("--routing", "cache-prior:strength=0,0.1,0.4", "--routing", "pruning:k=2")
SPECS = ["original", "cache-prior:strength=0.1,j=2", "pruning:k=2", "cache-prior:strength=0.4,j=2"]


def without_times(file: Path) -> dict[str, object]:
    document: dict[str, object] = json.loads(file.read_text())
    return {k: v for k, v in document.items() if k != "created"}


def test_a_sweep_measures_every_combination_into_one_file(sweep: Sweep, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    done = sweep(*ROUTING, "--slots", "15,30", "--output", file)
    assert done.code == 0, done.err
    results = load(file)
    assert [(r.routing, r.slots) for r in results.runs] == [
        *product(["original"], [15, 30]),
        *[(s, n) for n in (15, 30) for s in SPECS[1:3]],
        *product(["cache-prior:strength=0.4,j=2"], [15, 30]),
    ]
    assert all(r.complete and len(r.units) == 2 for r in results.runs)
    kl = [results.find(s, 15, "lru").metrics(results.model)["kl"] for s in SPECS]  # type: ignore[union-attr]
    assert kl[0] == 0 and kl[1] is not None and kl[3] is not None and 0 < kl[1] < kl[3]
    # In a pipe: a line for each finished run, then where the results are; tables on stdout.
    lines = done.err.splitlines()
    assert lines[0].startswith("1 of 8 runs · original, 15 slots, lru: ppl ")
    assert lines[-1] == f"8 runs in {file}; draw them with: mlx_moecache plot {file}"
    assert len(lines) == 9
    assert done.out.count("routing ") == 2 and all(s in done.out for s in SPECS)


def test_the_same_command_again_measures_nothing_and_a_larger_one_only_what_is_new(
    sweep: Sweep, tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    sweep("--routing", "price:delta=0.02", "--output", file)
    before = without_times(file)
    again = sweep("--routing", "price:delta=0.02", "-o", file)
    assert again.code == 0 and len(again.err.splitlines()) == 1
    assert without_times(file) == before
    more = sweep("--routing", "price:delta=0.02,0.1", "--output", file)
    assert len(more.err.splitlines()) == 2  # one run, and where the results are
    assert without_times(file)["runs"][:2] == before["runs"]  # type: ignore[index]


def test_an_interrupted_sweep_continues_and_ends_as_if_it_had_not_been(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    sweep(*ROUTING, "--output", whole)
    count = SweepProgress.count
    for stop_after in (1, 2, 4):
        seen = 0

        def interrupt(self: SweepProgress, run: Run, unit: Unit, stop_after: int = stop_after) -> None:
            nonlocal seen
            count(self, run, unit)
            seen += 1
            if seen == stop_after:
                raise KeyboardInterrupt

        monkeypatch.setattr(SweepProgress, "count", interrupt)
        done = sweep(*ROUTING, "--output", parts)
        assert done.code == 130
        assert done.err.splitlines()[-1].endswith(f"they are in {parts}, and the same command continues there")
    assert sum(len(r.units) for r in load(parts).runs) == 7
    monkeypatch.setattr(SweepProgress, "count", count)
    assert sweep(*ROUTING, "--output", parts).code == 0
    assert without_times(parts) == without_times(whole)


def test_a_dry_run_prints_the_grid_and_writes_nothing(sweep: Sweep, tmp_path: Path) -> None:
    done = sweep("--dry-run", "--slots", "25%,50%", "--eviction", "lru,decay:0.98", *ROUTING)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[:2] == ["1. 4 runs", "   original · 15,30 slots · lru,decay:0.98"]
    assert lines[-1] == "16 runs of 2 units: 32 units to measure"
    assert [p.name for p in tmp_path.iterdir()] == ["stories.txt"]


def test_without_routing_every_strategy_is_measured_and_a_bare_name_stands_for_its_values(sweep: Sweep) -> None:
    everything = sweep("--dry-run").out
    for name in ("pruning", "max-rank", "cumsum", "cache-prior", "mass-budget", "bounded-regret", "price"):
        assert f" {name}:" in everything
    assert everything.splitlines()[-1].startswith("40 runs of 2 units")
    assert sweep("--dry-run", "--routing", "price,cumsum").out.splitlines()[-1].startswith("13 runs of 2 units")


def test_a_dry_run_says_what_is_already_there(sweep: Sweep, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    sweep("--routing", "original", "--output", file)
    done = sweep("--dry-run", "--routing", "price:delta=0.02", "--output", file)
    assert done.out.splitlines()[-1] == "2 runs of 2 units, 1 of them already complete: 2 units to measure"


def test_json_goes_to_stdout_alone(sweep: Sweep, tmp_path: Path) -> None:
    done = sweep("--routing", "original", "--json", "--output", tmp_path / "r.json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out) == json.loads((tmp_path / "r.json").read_text())


def test_a_strategy_that_did_nothing_fails_and_the_others_are_kept(sweep: Sweep, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    done = sweep("--routing", "price:delta=1e-9", "--routing", "price:delta=0.1", "--output", file)
    assert done.code == 2
    assert "swapped no selection" in done.err.splitlines()[-1]
    assert {r.routing: r.complete for r in load(file).runs} == {
        "original": True,
        "price:delta=1e-09,j=1": False,
        "price:delta=0.1,j=1": True,
    }


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ([], "needs --output FILE"),
        (["--output", "{folder}"], "is a folder"),
        (["--output", "{folder}/no/results.json"], "folder that does not exist"),
        (["--dry-run", "--slots", "15,61"], "--slots must be from 1 to this model's 60 experts per layer, not 61"),
        (["--dry-run", "--slots", "3"], "between the 4 experts"),
        (["--dry-run", "--slots", "many"], "--slots needs whole numbers or shares"),
        (["--dry-run", "--eviction", "lruu"], "unknown eviction policy 'lruu'"),
        (["--dry-run", "--eviction", ","], "--eviction is empty"),
        (["--dry-run", "--routing", "cache-prior:strength=0.1,j=5"], "at most the model's 4"),
        (["--dry-run", "--routing", "prise"], "unknown routing 'prise'"),
        (["--dry-run", "--data", "/no/such/file"], "no /no/such/file"),
        (["--dry-run", "--task", "texts"], "choose"),
        (["--model", "x"], "--model"),
    ],
)
def test_wrong_flags_are_one_line(flags: list[str], part: str, refused: Callable[..., str], tmp_path: Path) -> None:
    assert part in refused(*(f.format(folder=tmp_path) for f in flags))


def test_results_of_another_evaluation_are_not_touched(
    sweep: Sweep, refused: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "r.json"
    sweep("--routing", "original", "--output", file)
    before = file.read_bytes()
    assert "window was 24, is 16" in refused("--routing", "original", "--window", "16", "--output", file)
    file.with_name("other.json").write_text("{}")
    assert "is not a results file" in refused("--output", file.with_name("other.json"))
    assert file.read_bytes() == before


# ---- progress ----


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_narrow_terminal_sees_one_line_that_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    runs = [
        Run("cache-prior:strength=0.1,j=2", "cache-prior", {}, 15, "lru", 3),
        Run("original", "original", {}, 15, "lru", 3),
    ]
    stream, results = Terminal(), empty_results(runs)
    with SweepProgress(results, runs, tmp_path / "r.json", stream=stream) as progress:
        for i, run in product(range(3), runs):
            run.units.append(Unit(i, 10, nll=20.0, misses=1, selections=40))
            progress.count(run, run.units[-1])
    written = stream.getvalue()
    assert "\n" not in written
    pieces = written.split("\r")
    assert max(map(len, pieces)) <= 39
    assert pieces[1].startswith("0 of 2 runs · ") and " left · cache" in pieces[1]
    assert any(p.startswith("2 of 2 runs · 0 s left") for p in pieces)
    assert pieces[-1] == "" and pieces[-2].strip() == ""
    assert load(tmp_path / "r.json").runs[0].units == runs[0].units


def test_in_a_pipe_long_runs_are_heard_of_once_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, now, stream = Run("original", "original", {}, 15, "lru", 100), 0.0, io.StringIO()
    monkeypatch.setattr("mlx_moecache.study.sweep_progress.time.monotonic", lambda: now)
    with SweepProgress(empty_results([run]), [run], tmp_path / "r.json", stream=stream) as progress:
        for i in range(100):
            now += 7.0
            run.units.append(Unit(i, 10, nll=20.0))
            progress.count(run, run.units[-1])
    lines = stream.getvalue().splitlines()
    assert len(lines) == 12  # each after 63 seconds, and the finished run
    assert lines[0] == "0 of 1 runs · 11 min left · original, 15 slots, lru: ppl 7.389"
    assert lines[-1] == "1 of 1 runs · original, 15 slots, lru: ppl 7.389"


def test_the_file_is_written_while_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, now = Run("original", "original", {}, 15, "lru", 100), 0.0
    monkeypatch.setattr("mlx_moecache.study.sweep_progress.time.monotonic", lambda: now)
    with SweepProgress(empty_results([run]), [run], tmp_path / "r.json", quiet=True) as progress:
        for i in range(8):
            now += 1.0
            run.units.append(Unit(i, 10, nll=20.0))
            progress.count(run, run.units[-1])
        assert len(load(tmp_path / "r.json").runs[0].units) == 6


def empty_results(runs: list[Run]) -> Results:
    from mlx_moecache.study.results import DataFacts, ModelFacts, Settings

    return Results(
        ModelFacts("demo", "qwen2_moe", EXPERTS, K, 6, 1, "ab"),
        DataFacts("text", "t", "cd", 3),
        Settings(10, 10, "all", "engine", "empty", None, 0),
        runs,
    )


def test_ctrl_c_on_a_terminal_keeps_what_was_measured(text: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_moecache", "sweep", "--task", "text", "--data", str(text), "--window", "32",
         "--slots", "15", "--routing", "price", "--output", str(file)],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(theirs)
    output, sent = b"", False
    try:
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # how Linux says that the other side is closed
                break
            if not piece:
                break
            output += piece
            if not sent and b"runs" in output:
                process.send_signal(signal.SIGINT)
                sent = True
        assert process.wait(timeout=30) == 130, output
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    last = output.decode().rstrip().splitlines()[-1]
    assert "Traceback" not in output.decode()
    assert re.match(r"interrupted with \d of 7 runs complete; they are in .*r\.json, and the same command", last)
    assert 1 <= sum(len(r.units) for r in load(file).runs) < 7 * 10
