"""`mlx_moecache evaluate`: tables, JSON, results files, interruption and wrong input, as a person sees them.

Where only the command is under test, a scorer without a model's arithmetic takes the place of window scoring, so that
a test takes no longer than opening the demo model. The last tests run the real thing.
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from stepwise_scorer import StepwiseScorer

from mlx_moecache.cli import main as cli_main
from mlx_moecache.demo import DEMO_MODEL
from mlx_moecache.errors import UsageError
from mlx_moecache.evaluate import main, split_specs
from mlx_moecache.loading import OpenedModel
from mlx_moecache.routing import CachePrior, Original, Strategy
from mlx_moecache.simulate import main as simulate
from mlx_moecache.study.recurrence import Counts
from mlx_moecache.study.result_metrics import Unit
from mlx_moecache.study.results import Run, load
from mlx_moecache.study.subject_table import subject_table
from mlx_moecache.study.tasks_mmlu import MmluDocument

V = 4096
STORY = (
    "Once upon a time, there was a little fox named Tim. He loved to play in the garden with his friend Lily. One day, "
    "they found a big red box under a tree. Lily wanted to open it, but Tim was scared. "
) * 12


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


class FakeScorer:
    """The contract of WindowScorer without a model: logits depend on tokens, D and strength."""

    forwards = 0
    interrupt_at: int | None = None  # the forward at which the user presses Ctrl-C
    swaps = 1
    settings: list[dict[str, Any]] = []  # noqa: RUF012  # of all scorers that were made

    def __init__(self, model: Any, strategy: Strategy, **settings: Any) -> None:
        FakeScorer.settings.append(settings)
        self.strength = float(getattr(strategy, "strength", getattr(strategy, "delta", 0.0)))
        self.ranges = [(0.0, 0)] * 6
        self.sequence, self.caches = 0, ""
        self.own_selections = [np.arange(40).reshape(10, 4)] * 6
        self._counts = Counts()

    def forward(self, tokens: Sequence[int], *, biased_from: int = 0, counted_from: int = 0) -> mx.array:
        FakeScorer.forwards += 1
        if FakeScorer.forwards == FakeScorer.interrupt_at:
            raise KeyboardInterrupt
        total, n = self.ranges[0]
        self.ranges = [(total + sum(tokens), n + len(tokens))] * 6
        rng = np.random.default_rng(list(tokens))
        x = rng.normal(size=(len(tokens), V)) + self.strength * (1 + total % 7) * rng.normal(size=(len(tokens), V))
        swapped = FakeScorer.swaps if self.strength and biased_from < len(tokens) else 0
        self._counts += Counts(6 * len(tokens), 6 * len(tokens), 24 * len(tokens), 9, 9, swapped, 5, 2, 50, 0.5)
        return mx.array(x.astype(np.float32))

    def take_counts(self) -> Counts:
        taken, self._counts = self._counts, Counts()
        return taken


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeScorer]:
    module = types.ModuleType("mlx_moecache.study.window")
    module.WindowScorer = FakeScorer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlx_moecache.study.window", module)
    for name, value in (("forwards", 0), ("interrupt_at", None), ("swaps", 1), ("settings", [])):
        monkeypatch.setattr(FakeScorer, name, value)
    return FakeScorer


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def run(*argv: object) -> Done:
        code = main([str(a) for a in argv])
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(STORY)
    return path


@pytest.fixture
def text(story: Path) -> list[object]:
    """Arguments of a small evaluation: 5 windows of 16 tokens, two strategies."""
    return ["demo", "--task", "text", "--data", story, "--window", 16, "--limit", 5, "--slots", 30]


@pytest.fixture
def refused(command: Callable[..., Done]) -> Callable[..., str]:
    """Runs a command that must fail at once: exit code 2, one line on stderr, nothing on stdout."""

    def run(*argv: object) -> str:
        done = command(*argv)
        assert (done.code, done.out) == (2, ""), done
        assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
        return done.err

    return run


def without_time(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return {**data, "created": None}


# ---- what is printed and kept ----


def test_several_strategies_come_out_as_one_table(
    fake: type[FakeScorer], command: Callable[..., Done], text: list[object]
) -> None:
    done = command(*text)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "demo_model (qwen2_moe): 6 layers of 60 experts, 4 per token"
    assert lines[1].startswith("text story.txt (sha256 ") and lines[1].endswith("windows of 16 tokens")
    assert lines[2] == "bias scope all, cache empty at the start, engine accounting, seed 0"
    assert lines[4].split()[:4] == ["routing", "slots", "n", "perplexity"]
    assert [line.split()[:3] for line in lines[5:]] == [
        ["original", "30", "5"],
        ["cache-prior:strength=0.1,j=2", "30", "5"],
    ]
    assert fake.forwards == 10  # original serves as the exact reference of the other


def test_json_is_one_object_and_the_same_as_the_file(
    fake: type[FakeScorer], command: Callable[..., Done], text: list[object], tmp_path: Path
) -> None:
    done = command(*text, "--json", "--output", tmp_path / "r.json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out) == json.loads((tmp_path / "r.json").read_text())
    results = load(tmp_path / "r.json")
    assert results.model.path == "demo_model" and results.model.bytes_per_expert > 10_000
    assert results.data.documents > 5 and results.settings.limit == 5
    original, biased = results.runs
    assert (original.routing, biased.routing) == ("original", "cache-prior:strength=0.1,j=2")
    assert biased.parameters == {"strength": 0.1, "j": 2} and biased.complete
    assert [u.kl for u in original.units] == [0.0] * 5 and all(u.kl for u in biased.units)
    assert all(u.belady_misses == 6 * 40 for u in biased.units)  # ten calls of four new experts each


def test_settings_reach_the_scorer_and_the_results(
    fake: type[FakeScorer], command: Callable[..., Done], text: list[object], tmp_path: Path
) -> None:
    flags = ["--accounting", "paper", "--initial", "warm", "--seed", 3, "--eviction", "lfu", "--stride", 8]
    done = command(*text, *flags, "--output", tmp_path / "r.json")
    assert done.code == 0
    for made in fake.settings:
        assert made == {"slots": 30, "eviction": "lfu", "accounting": "paper", "initial": "warm", "seed": 3}
    s = load(tmp_path / "r.json").settings
    assert (s.accounting, s.initial, s.seed, s.stride, s.window) == ("paper", "warm", 3, 8, 16)
    assert "Belady" not in done.out  # the bound is for caches that start empty


def test_by_default_half_of_the_experts_are_cached(
    fake: type[FakeScorer], command: Callable[..., Done], story: Path
) -> None:
    done = command("--task", "text", "--data", story, "--window", 16, "--limit", 1, "--routing", "price")
    assert done.code == 0 and fake.settings[0]["slots"] == 30


def test_under_scope_decode_a_text_is_not_biased(
    fake: type[FakeScorer], command: Callable[..., Done], text: list[object]
) -> None:
    done = command(*text, "--bias-scope", "decode", "--json")
    assert done.code == 0
    runs = json.loads(done.out)["runs"]
    assert [r["metrics"]["swapped_share"] for r in runs] == [0, 0]


def test_a_wikitext_file_is_joined_by_its_protocol(
    fake: type[FakeScorer], command: Callable[..., Done], tmp_path: Path
) -> None:
    raw = tmp_path / "wiki.valid.raw"
    raw.write_text(" \n = A fox = \n \n" + STORY + "\n")
    done = command("--task", "wikitext", "--data", raw, "--window", 16, "--limit", 2, "--json")
    assert done.code == 0
    data = json.loads(done.out)["data"]
    tokenizer = OpenedModel(DEMO_MODEL).tokenizer()
    joined = "\n\n".join(["", " = A fox = \n", "", STORY + "\n"])
    assert data["documents"] == (len(tokenizer.encode(joined, add_special_tokens=False)) - 1) // 16


def test_specs_are_split_at_commas_that_do_not_belong_to_their_parameters() -> None:
    given = ["original,cache-prior:strength=0.1,j=2,price", "price:delta=0.1,j=1", "original"]
    assert split_specs(given) == ["original", "cache-prior:strength=0.1,j=2", "price", "price:delta=0.1,j=1"]
    with pytest.raises(UsageError, match="names no strategy"):
        split_specs([" , "])


def test_the_same_strategy_named_twice_is_measured_once(
    fake: type[FakeScorer], command: Callable[..., Done], text: list[object]
) -> None:
    done = command(*text, "--routing", "cache-prior", "--routing", "cache-prior:strength=0.1,j=2", "--json")
    assert len(json.loads(done.out)["runs"]) == 1


# ---- interrupted, continued, refused ----


@pytest.mark.parametrize("at", [2, 6, 9])
def test_an_interrupted_evaluation_is_kept_and_continued_to_the_same_results(
    fake: type[FakeScorer],
    command: Callable[..., Done],
    text: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    assert command(*text, "--output", tmp_path / "whole.json").code == 0
    monkeypatch.setattr(FakeScorer, "forwards", 0)
    monkeypatch.setattr(FakeScorer, "interrupt_at", at)
    done = command(*text, "--output", tmp_path / "part.json")
    assert done.code == 130
    assert done.err.startswith(f"interrupted after {at - 1} of 10 units; they are in ") and "continues" in done.err
    assert "incomplete: original (" in done.out
    kept = load(tmp_path / "part.json")
    assert sum(len(r.units) for r in kept.runs) == at - 1 and not all(r.complete for r in kept.runs)
    monkeypatch.setattr(FakeScorer, "interrupt_at", None)
    assert command(*text, "--output", tmp_path / "part.json").code == 0
    assert without_time(tmp_path / "part.json") == without_time(tmp_path / "whole.json")


def test_interrupted_without_output_says_that_nothing_is_kept(
    fake: type[FakeScorer], command: Callable[..., Done], text: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeScorer, "interrupt_at", 4)
    done = command(*text)
    assert done.code == 130 and "nothing was kept (--output keeps it)" in done.err and "incomplete" in done.out


def test_windows_that_overlap_say_so_and_results_that_scored_tokens_twice_are_not_continued(
    fake: type[FakeScorer],
    command: Callable[..., Done],
    refused: Callable[..., str],
    text: list[object],
    tmp_path: Path,
) -> None:
    output = tmp_path / "r.json"
    done = command(*text, "--stride", 4, "--output", output)
    assert ", windows of 16 tokens every 4, each token scored once" in done.out and "Belady" not in done.out
    assert [u.tokens for u in load(output).runs[1].units] == [16, 4, 4, 4, 4]
    earlier = json.loads(output.read_text())
    del earlier["settings"]["scored"]  # as it was when all tokens of all windows were scored
    output.write_text(json.dumps(earlier))
    assert "settings scored was None, is new" in refused(*text, "--stride", 4, "--output", output)
    # Windows apart mean what they did.
    done = command(*text, "--stride", 16, "--output", tmp_path / "apart.json")
    assert "scored once" not in done.out and "Belady" in done.out
    apart = json.loads((tmp_path / "apart.json").read_text())
    assert apart["settings"].pop("scored") is None
    (tmp_path / "apart.json").write_text(json.dumps(apart))
    assert command(*text, "--stride", 16, "--output", tmp_path / "apart.json") == done


def test_a_complete_evaluation_is_only_printed_again_and_new_strategies_are_added(
    fake: type[FakeScorer], command: Callable[..., Done], text: list[object], tmp_path: Path
) -> None:
    first = command(*text, "--output", tmp_path / "r.json")
    again = command(*text, "--output", tmp_path / "r.json")
    assert again == first and fake.forwards == 10
    done = command(*text, "--output", tmp_path / "r.json", "--routing", "price")
    assert done.code == 0 and [r.strategy for r in load(tmp_path / "r.json").runs] == [
        "original",
        "cache-prior",
        "price",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--window", 17], "settings window was 16, is 17"),
        (["--limit", 4], "settings limit was 5, is 4"),
        (["--seed", 9], "settings seed was 0, is 9"),
    ],
)
def test_a_results_file_of_other_settings_is_refused_and_stays(
    fake: type[FakeScorer],
    command: Callable[..., Done],
    refused: Callable[..., str],
    text: list[object],
    tmp_path: Path,
    change: list[object],
    message: str,
) -> None:
    command(*text, "--output", tmp_path / "r.json")
    before = (tmp_path / "r.json").read_bytes()
    assert message in refused(*text, "--output", tmp_path / "r.json", *change)
    assert (tmp_path / "r.json").read_bytes() == before


def test_a_results_file_of_other_data_or_version_or_kind_is_refused_and_stays(
    fake: type[FakeScorer],
    command: Callable[..., Done],
    refused: Callable[..., str],
    text: list[object],
    story: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "r.json"
    command(*text, "--output", output)
    story.write_text(STORY + "The end.")
    assert "data sha256 was " in refused(*text, "--output", output)
    data = json.loads(output.read_text())
    output.write_text(json.dumps({**data, "version": 7}))
    assert "version 7" in refused(*text, "--output", output)
    output.write_text("my diary")
    assert "not a results file" in refused(*text, "--output", output)
    assert output.read_text() == "my diary"


def test_a_strategy_that_swapped_nothing_fails_and_the_file_says_so(
    fake: type[FakeScorer],
    command: Callable[..., Done],
    text: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakeScorer, "swaps", 0)
    done = command(*text, "--output", tmp_path / "r.json")
    assert done.code == 2 and done.err.count("\n") == 1
    assert done.err.startswith("error: cache-prior:strength=0.1,j=2 with 30 of 60 experts in memory swapped no select")
    assert "FAILED: cache-prior" in done.out
    original, biased = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert (original["failed"], original["complete"], biased["complete"]) == (None, True, False)
    assert "swapped no selection" in biased["failed"]
    everything = command(*text[:-1], 60)  # with all experts in memory there is nothing to swap
    assert everything.code == 0


def test_an_error_while_measuring_keeps_what_was_measured(
    fake: type[FakeScorer],
    command: Callable[..., Done],
    text: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward = FakeScorer.forward

    def broken(self: FakeScorer, tokens: Sequence[int], **settings: int) -> mx.array:
        logits = forward(self, tokens, **settings)
        return logits * float("nan") if FakeScorer.forwards == 5 else logits

    monkeypatch.setattr(FakeScorer, "forward", broken)
    done = command(*text, "--output", tmp_path / "r.json")
    assert done.code == 2 and "are not finite" in done.err
    assert sum(len(r.units) for r in load(tmp_path / "r.json").runs) == 4


# ---- wrong input ----


def test_what_is_missing_or_unusable_is_named(refused: Callable[..., str], text: list[object], tmp_path: Path) -> None:
    data = text[4]
    (tmp_path / "empty.txt").touch()
    for argv, message in (
        ([], "--task and --data is missing"),
        (["--task", "text"], "--data is missing"),
        (["--task", "text", "--data", tmp_path / "no.txt"], "there is no "),
        (["--task", "text", "--data", tmp_path], "is a folder"),
        (["--task", "text", "--data", tmp_path / "empty.txt"], "holds no text"),
        (["--task", "poems", "--data", data], "unknown value 'poems' (choose wikitext, text, gsm8k, mmlu, "),
        ([*text, "--limit", 0], "--limit: must be at least 1, not 0"),
        ([*text, "--window", 5000], "one window needs 5,001"),
        ([*text, "--slots", 3], "slots must be between the 4 experts that a token uses and the 60"),
        ([*text, "--slots", 61], "not 61"),
        ([*text, "--routing", "best"], "unknown routing 'best'"),
        ([*text, "--routing", "cache-prior:strength=x"], "needs a number"),
        ([*text, "--memory", "lots"], "lots"),
        ([*text, "--eviction", "fifo"], "unknown eviction policy 'fifo'"),
        ([*text, "--shots", 3], "--shots means nothing for the task text"),
        ([*text, "--output", tmp_path], "is a folder"),
        ([*text, "--output", tmp_path / "no" / "r.json"], "folder that does not exist"),
        (["--model", "demo"], "it comes first"),
        (["--task", "gsm8k", "--data", tmp_path, "--bias-scope", "all"], "never biased"),
        (["--task", "gsm8k", "--data", tmp_path, "--initial", "warm"], "--initial empty"),
        (["--task", "gsm8k", "--data", tmp_path, "--window", 9], "--window means nothing for the task gsm8k"),
        (["nowhere/model", *text[1:]], "nowhere/model"),
    ):
        assert message in refused(*argv), argv


def test_a_budget_that_cannot_work_says_what_the_logits_take(
    fake: type[FakeScorer], refused: Callable[..., str], text: list[object], tmp_path: Path
) -> None:
    message = refused(*text, "--memory", "2MB", "--output", tmp_path / "r.json")
    assert "of 2.00 MB, the logits of 16 tokens take 524 KB, and a memory budget of 1.48 MB is too small" in message
    assert not (tmp_path / "r.json").exists()


def test_help_lists_every_flag_and_the_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["-h"])
    out = capsys.readouterr().out
    for flag in ("--task", "--data", "--routing", "--slots", "--window", "--bias-scope", "--limit", "--output"):
        assert f"\n  {flag}" in out
    assert cli_main(["help"]) == 0
    assert "\n  evaluate  " in capsys.readouterr().out


# ---- questions ----


def write_mmlu(folder: Path) -> Path:
    for part, n in (("dev", 2), ("test", 3)):
        (folder / part).mkdir(parents=True)
        for subject in ("foxes", "gardens"):
            with (folder / part / f"{subject}_{part}.csv").open("w", newline="") as file:
                rows = [[f"{subject}, {part} {i}?", "red", "big", "old", "new", "ABCD"[i]] for i in range(n)]
                csv.writer(file).writerows(rows)
    return folder


def write_gsm8k(folder: Path) -> Path:
    folder.mkdir()
    for part, n in (("train", 3), ("test", 3)):
        problems = [{"question": f"{part}: {i} and 1?", "answer": f"{i}+1={i + 1}\n#### {i + 1}"} for i in range(n)]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    return folder


def test_choices_are_read_once_per_question_and_judged(
    fake: type[FakeScorer], command: Callable[..., Done], tmp_path: Path
) -> None:
    argv = ["--task", "mmlu", "--data", write_mmlu(tmp_path / "mmlu"), "--shots", 1, "--slots", 20, "--limit", 5]
    done = command(*argv, "--output", tmp_path / "r.json")
    assert done.code == 0 and "accuracy %" in done.out and "perplexity" not in done.out and "1-shot" in done.out
    assert fake.forwards == 10  # four choices of one token share the context
    results = load(tmp_path / "r.json")
    assert (results.data.documents, results.settings.shots, results.settings.scope) == (6, 1, "all")
    assert {u.correct for r in results.runs for u in r.units} <= {0, 1}
    assert command(*argv, "--output", tmp_path / "r.json").out == done.out and fake.forwards == 10
    (tmp_path / "mmlu" / "test" / "foxes_test.csv").write_text("changed?,a,b,c,d,A\n")
    assert "data sha256" in command(*argv, "--output", tmp_path / "r.json").err


def test_the_accuracy_of_each_subject_is_shown(
    fake: type[FakeScorer], command: Callable[..., Done], tmp_path: Path
) -> None:
    argv = ["--task", "mmlu", "--data", write_mmlu(tmp_path / "mmlu"), "--shots", 1, "--slots", 20, "--limit", 5]
    done = command(*argv, "--json")
    runs = json.loads(done.out)["runs"]
    assert [{s: x["n"] for s, x in r["subjects"].items()} for r in runs] == [{"foxes": 3, "gardens": 2}] * 2
    for r in runs:
        right = sum(round(x["n"] * x["accuracy"]) for x in r["subjects"].values())
        assert right == sum(u["correct"] for u in r["units"])
    lines = command(*argv).out.splitlines()
    (head,) = (line for line in lines if line.startswith("accuracy %"))
    foxes, gardens = lines[lines.index(head) + 1 :]
    assert head.split()[2] == "n" and "original" in head and "cache-prior" in head
    assert foxes.split()[:2] == ["foxes", "3"] and gardens.split()[:2] == ["gardens", "2"]
    shown = f"{100 * runs[0]['subjects']['foxes']['accuracy']:.1f}"
    assert foxes.split()[2] == shown


def test_other_tasks_have_no_subjects(fake: type[FakeScorer], command: Callable[..., Done], text: list[object]) -> None:
    assert all("subjects" not in r for r in json.loads(command(*text, "--json").out)["runs"])
    assert "accuracy" not in command(*text).out


def test_subjects_of_many_runs_come_below_each_other_where_the_terminal_is_narrow() -> None:
    documents = [MmluDocument(i, "", (" A", " B"), 0, subject) for i, subject in enumerate(["foxes", "gardens"])]
    units = [Unit(0, 1, correct=1), Unit(1, 1, correct=0)]
    runs = [Run(f"cache-prior:strength=0.{i},j=2", "cache-prior", {}, 20, "lru", 2, units=units) for i in range(4)]
    assert len(subject_table(runs, documents)) == 3
    narrow = subject_table(runs, documents, 60)
    assert len(narrow) == 12 and max(map(len, narrow)) <= 60
    assert narrow[1].split() == ["foxes", "1", "100.0"] and narrow[2].split() == ["gardens", "1", "0.0"]
    assert subject_table([], documents) == []


def test_replies_are_generated_with_a_real_cache_and_continued(
    command: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--task", "gsm8k", "--data", write_gsm8k(tmp_path / "gsm8k"), "--shots", 1, "--max-tokens", 6]
    argv += ["--slots", 12, "--routing"]
    price = "price:delta=0.2,j=1"
    whole, part = tmp_path / "whole.json", tmp_path / "part.json"
    done = command(*argv, f"original,{price}", "--output", whole)
    assert done.code == 0 and "accuracy %" in done.out and "flexible %" in done.out
    results = load(whole)
    assert (results.settings.scope, results.settings.max_tokens) == ("decode", 6)
    original, biased = results.runs
    assert all(u.tokens == 6 and u.selections == 5 * 6 * 4 for u in original.units)
    assert not any(u.swapped for u in original.units) and any(u.swapped for u in biased.units)

    import mlx_moecache.study.evaluation_session as session

    answer, answered = session.answer_question, []

    def interrupted(*args: Any) -> Unit:
        answered.append(args)
        if len(answered) == 3:
            raise KeyboardInterrupt
        return answer(*args)

    monkeypatch.setattr(session, "answer_question", interrupted)
    assert command(*argv, price, "--output", part).code == 130
    assert load(part).runs[0].units == biased.units[:2]
    monkeypatch.setattr(session, "answer_question", answer)
    assert command(*argv, price, "--output", part).code == 0
    assert load(part).runs == [biased]


# ---- the real command ----


def test_figures_are_those_of_stepping_the_real_cache(
    command: Callable[..., Done], story: Path, tmp_path: Path
) -> None:
    """Two windows, so that D has to persist and the cache must not."""
    strategies: list[Strategy] = [Original(), CachePrior(0.2, 1)]
    done = command(
        "--task", "text", "--data", story, "--window", 32, "--limit", 2, "--slots", 12, "--json",
        *(x for s in strategies for x in ("--routing", s.spec)),
    )  # fmt: skip
    assert done.code == 0, done.err
    ids = OpenedModel(DEMO_MODEL).tokenizer().encode(STORY, add_special_tokens=False)
    for strategy, run in zip(strategies, json.loads(done.out)["runs"], strict=True):
        scorer = StepwiseScorer(DEMO_MODEL, strategy, slots=12)
        for i, unit in enumerate(run["units"]):
            window = ids[32 * i : 32 * i + 33]
            logits = np.array(scorer.forward(window[:-1]), dtype=np.float64)
            logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            counts = scorer.take_counts()
            assert unit["nll"] == pytest.approx(-logprobs[np.arange(32), window[1:]].sum(), rel=1e-5)
            for name in ("selections", "misses", "loads", "swapped", "token_layers", "all_hit", "lives", "life_tokens"):
                assert unit[name] == getattr(counts, name), name
            assert unit["mass_lost"] == pytest.approx(counts.mass_lost, abs=1e-3)
        scorer.close()
    assert all(u["belady_misses"] <= u["misses"] for u in run["units"] if run["strategy"] == "original")


def test_a_trace_of_the_original_routing_replays_to_the_same_misses(
    command: Callable[..., Done],
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    story: Path,
    tmp_path: Path,
) -> None:
    trace, other = tmp_path / "story.trace", tmp_path / "notes.txt"
    flags = ("--task", "text", "--data", story, "--window", "64", "--limit", "2", "--slots", "12")
    strategies = ("--routing", "price:delta=0.05", "--routing", "original")
    runs = {r["strategy"]: r for r in json.loads(command(*flags, *strategies, "--trace", trace, "--json").out)["runs"]}
    assert simulate([str(trace), "--slots", "12", "--eviction", "lru", "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)["results"][0]
    assert replayed["exact"]
    assert replayed["decode"]["misses"] == sum(u["misses"] for u in runs["original"]["units"]) > 0
    other.write_text("not mine")
    assert "not a trace" in refused(*flags, "--trace", other)
    assert other.read_text() == "not mine"


def test_ctrl_c_keeps_whole_units_and_the_same_command_goes_on_after_them(story: Path, tmp_path: Path) -> None:
    story.write_text(STORY * 40)  # for a minute
    output = tmp_path / "r.json"
    argv = [sys.executable, "-m", "mlx_moecache.evaluate", "--task", "text", "--data", str(story), "--window", "32"]
    argv += ["--slots", "12", "--output", str(output)]

    def interrupt_after_the_first_unit() -> str:
        process, terminal = start_on_terminal(argv)
        screen = read_until(terminal, " ppl ")  # in the bar
        process.send_signal(signal.SIGINT)
        screen += read_to_end(process, terminal)
        assert process.returncode == 130, screen
        assert "interrupted after " in screen and "Traceback" not in screen, screen
        return screen

    interrupt_after_the_first_unit()
    kept = load(output)
    done = [len(r.units) for r in kept.runs]
    assert sum(done) >= 1 and not any(r.complete for r in kept.runs)
    screen = interrupt_after_the_first_unit()
    assert f" {sum(done)}/{sum(r.n for r in kept.runs)} [" in screen  # where the bar begins
    longer = load(output)
    assert sum(len(r.units) for r in longer.runs) > sum(done)
    for before, after in zip(kept.runs, longer.runs, strict=True):
        assert after.units[: len(before.units)] == before.units


def start_on_terminal(argv: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    """The command on a terminal of 80 columns, and the terminal's other end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    return process, ours


def read_until(terminal: int, text: str) -> str:
    seen = ""
    while text not in seen:
        assert select.select([terminal], [], [], 60)[0], f"no {text!r} within a minute: {seen!r}"
        seen += os.read(terminal, 4096).decode(errors="replace")
    return seen


def read_to_end(process: subprocess.Popen[bytes], terminal: int) -> str:
    seen = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # Linux: the other end is closed
            part = b""
        if not part:
            break
        seen += part
    process.wait(timeout=60)
    os.close(terminal)
    return seen.decode(errors="replace")
