"""Warm start: which experts are noted, for which checkpoint, what becomes of broken files, and what a person sees."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from serving_helpers import CHAT, ServerProcess, ask
from tiny_models import Shelf, random_tokens, tiny_config, write_checkpoint

from mlx_moecache import warm_start
from mlx_moecache.checkpoints.reader import ExpertReader, ReadRequest
from mlx_moecache.console.warm_start_options import WarmStart
from mlx_moecache.demo import DEMO_MODEL
from mlx_moecache.errors import ReadError, UsageError
from mlx_moecache.expert_cache import ExpertCache
from mlx_moecache.generate import main
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.warm_start import Warming, WarmSetFile, cache_folder, checkpoint_key, warm_set

EXPERTS = (16, 16)
STORED = ((1, 2, 3), (15, 0))


# ---- where ----


def test_the_cache_folder_is_that_of_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder({}, "darwin") == tmp_path / "Library" / "Caches" / "mlx_moecache"
    assert cache_folder({"XDG_CACHE_HOME": "/elsewhere"}, "darwin") == cache_folder({}, "darwin")
    assert cache_folder({}, "linux") == tmp_path / ".cache" / "mlx_moecache"
    assert cache_folder({"XDG_CACHE_HOME": "/elsewhere"}, "linux") == Path("/elsewhere/mlx_moecache")
    assert cache_folder({"XDG_CACHE_HOME": "relative"}, "linux") == tmp_path / ".cache" / "mlx_moecache"


def test_a_user_without_a_home_is_told_which_flag_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(UsageError, match="--warm-start-folder"):
        cache_folder({}, "linux")


# ---- for which checkpoint ----


def test_a_checkpoint_is_known_wherever_it_lies_and_told_from_others(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", tiny_config("olmoe"), shards=2)
    key = checkpoint_key(folder)
    assert len(key) == 64
    moved = Path(shutil.copytree(folder, tmp_path / "b"))
    assert checkpoint_key(moved) == key
    (moved / "config.json").write_bytes((moved / "config.json").read_bytes() + b" ")
    assert checkpoint_key(moved) != key
    assert checkpoint_key(write_checkpoint(tmp_path / "c", tiny_config("olmoe", num_hidden_layers=2))) != key
    shards = write_checkpoint(tmp_path / "d", tiny_config("olmoe"), shards=3)
    shutil.copy(folder / "config.json", shards)
    assert checkpoint_key(shards) != key


# ---- what is in the file ----


@pytest.fixture
def stored(tmp_path: Path) -> WarmSetFile:
    file = WarmSetFile(tmp_path / "cache" / "warm_start" / "file.json", "k" * 64)
    assert file.read(EXPERTS) is None
    file.write(STORED)
    return file


def test_what_was_written_is_read_again_and_nothing_else_is_left(stored: WarmSetFile) -> None:
    assert stored.read(EXPERTS) == STORED
    stored.write(((7,), ()))
    assert stored.read(EXPERTS) == ((7,), ())
    assert [p.name for p in stored.path.parent.iterdir()] == ["file.json"]
    assert set(json.loads(stored.path.read_text())) == {"format", "version", "checkpoint", "experts"}


def test_a_write_that_fails_leaves_the_earlier_file(stored: WarmSetFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UsageError, match="No space left"):
        stored.write(((7,), ()))
    assert stored.read(EXPERTS) == STORED
    assert [p.name for p in stored.path.parent.iterdir()] == ["file.json"]


def changed(**changes: Any) -> Callable[[dict[str, Any]], bytes]:
    return lambda content: json.dumps({**content, **changes}).encode()


BROKEN: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "is damaged": lambda content: json.dumps(content).encode()[:-20],
    "is damaged (": lambda content: b"\xff\xfe\x00",
    "is damaged (maximum recursion": lambda content: b"[" * 100_000,
    "is no warm start": lambda content: b"[1, 2]",
    "is no warm start of mlx_moecache": changed(format="something else"),
    "has version 2 of the format": changed(version=2),
    "is of another checkpoint": changed(checkpoint="x" * 64),
    "has other layers than the model": changed(experts=[[1]]),
    "has other layers": changed(experts={"0": [1]}),
    "has experts that the model lacks": changed(experts=[[1], [16]]),
    "has experts that the model": changed(experts=[[1], [-1]]),
    "has experts that the": changed(experts=[[1], [True]]),
    "has experts that": changed(experts=[[1], 5]),
    "is far too large": lambda content: b" " * (warm_start.MOST_BYTES + 1),
}


@pytest.mark.parametrize(("reason", "broken"), BROKEN.items(), ids=BROKEN)
def test_a_file_that_cannot_be_used_is_refused_with_the_reason(
    reason: str, broken: Callable[[dict[str, Any]], bytes], stored: WarmSetFile
) -> None:
    stored.path.write_bytes(broken(json.loads(stored.path.read_text())))
    with pytest.raises(UsageError) as refusal:
        stored.read(EXPERTS)
    assert reason in str(refusal.value) and "will be replaced" in str(refusal.value)
    stored.write(STORED)
    assert stored.read(EXPERTS) == STORED


# ---- what is noted, and reading it ----

SLOTS = 6  # of 16 experts; each token uses 4
TOKENS = random_tokens(1, 24)


def open_cache(shelf: Shelf, slots: int = SLOTS) -> tuple[Any, ExpertCache]:
    opened = OpenedModel(shelf.checkpoint("olmoe", "4bit"))
    model = opened.load(MemoryOptions(slots=slots), CacheOptions(routing="original"))
    return model, model.expert_cache


def read_text(model: Any) -> mx.array:
    kv = make_prompt_cache(model)
    logits = [model(TOKENS[:, i : i + 1], cache=kv) for i in range(TOKENS.shape[1])]
    mx.eval(logits)
    return mx.concatenate(logits, axis=1)


def test_the_residents_are_noted_after_those_of_earlier_runs(shelf: Shelf) -> None:
    _, cache = open_cache(shelf)
    assert warm_set(cache) is None  # nothing was used
    cache.warm([[5, 2], [3]] + [[]] * (len(cache.layers) - 2))
    noted = warm_set(cache)
    assert noted is not None and noted[:2] == ((5, 2), (3,))
    earlier = [(9, 2, 8), (3,)] + [(4,)] * (len(cache.layers) - 2)
    noted = warm_set(cache, tuple(earlier))
    assert noted is not None and noted[:3] == ((9, 8, 5, 2), (3,), (4,))


def test_layers_that_hold_all_experts_say_nothing_of_use(shelf: Shelf) -> None:
    _, cache = open_cache(shelf, slots=16)
    assert warm_set(cache) is None
    earlier = ((1,),) * len(cache.layers)
    assert warm_set(cache, earlier) == earlier


def test_warming_on_a_thread_makes_the_same_experts_resident_and_the_output_is_the_same(shelf: Shelf) -> None:
    model, cache = open_cache(shelf)
    logits = read_text(model)
    experts = warm_set(cache)
    assert experts is not None
    later, other = open_cache(shelf)
    warming = Warming(other, experts)
    while warming.experts < sum(map(len, experts)):
        pass
    warming.finish()
    warming.finish()
    assert warm_set(other) == experts and warming.error is None
    assert warming.nbytes == other.reader.bytes_read > 0 and other.stats == type(other.stats)()
    assert mx.array_equal(read_text(later), logits)
    assert other.stats.decode.hits > cache.stats.decode.hits


def test_warming_stops_after_the_layer_under_way(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = open_cache(shelf)
    logits = read_text(model)
    experts = warm_set(cache)
    assert experts is not None
    later, other = open_cache(shelf)
    warm, reached, go_on = other.warm, threading.Event(), threading.Event()

    def waits(ids: Any) -> int:
        reached.set()
        assert go_on.wait(20)
        return warm(ids)

    monkeypatch.setattr(other, "warm", waits)
    warming = Warming(other, experts)
    assert reached.wait(20)
    threading.Timer(0.1, go_on.set).start()
    warming.finish()
    assert other.contents().experts == (experts[0], *[()] * (len(experts) - 1))
    assert warming.experts == len(experts[0])
    assert mx.array_equal(read_text(later), logits)


def test_a_read_that_fails_ends_the_warming_and_nothing_else(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = open_cache(shelf)
    warm = cache.warm

    def fails(ids: Any) -> int:
        if ids[1]:
            raise ReadError("the disk is gone")
        return warm(ids)

    monkeypatch.setattr(cache, "warm", fails)
    warming = Warming(cache, ((1, 2),) * len(cache.layers))
    while warming.error is None:
        pass
    warming.finish()
    assert "the disk is gone" in str(warming.error) and warming.experts == 2
    assert mx.array_equal(read_text(model), read_text(open_cache(shelf)[0]))


# ---- what commands with a prompt of their own do ----


def started(model: Any, folder: Path, cache_folder: Path, *, on: bool = True) -> WarmStart:
    args = argparse.Namespace(warm_start=on, warm_start_folder=cache_folder)
    return WarmStart(args, folder, model)


def test_a_conversation_begins_warm_whatever_comes_first(shelf: Shelf, tmp_path: Path) -> None:
    folder = shelf.checkpoint("olmoe", "4bit")
    model, cache = open_cache(shelf)
    first = started(model, folder, tmp_path)
    first.begin()  # nothing yet
    first.finish()
    assert first.done is None and cache.contents().experts == ((),) * len(cache.layers)
    logits = read_text(model)
    first.save()
    later, other = open_cache(shelf)
    second = started(later, folder, tmp_path)
    second.begin()
    second.finish()
    assert second.done is not None and second.done.nbytes == other.reader.bytes_read
    held = [x for x in other.contents().experts if x]
    assert tuple(held) == cache.contents().experts[: len(held)]
    assert mx.array_equal(read_text(later), logits)
    second.save()
    assert second.notes == [] and len(list(tmp_path.rglob("*.json"))) == 1


def test_a_conversation_that_ends_before_its_first_message_forgets_nothing(shelf: Shelf, tmp_path: Path) -> None:
    folder = shelf.checkpoint("olmoe", "4bit")
    model, _ = open_cache(shelf)
    read_text(model)
    first = started(model, folder, tmp_path)
    first.save()
    (file,) = tmp_path.rglob("*.json")
    stored = {tuple(sorted(ids)) for ids in json.loads(file.read_text())["experts"]}
    later, _ = open_cache(shelf)
    second = started(later, folder, tmp_path)
    second.begin()
    second.save()
    assert {tuple(sorted(ids)) for ids in json.loads(file.read_text())["experts"]} == stored


def test_switched_off_it_does_nothing(shelf: Shelf, tmp_path: Path) -> None:
    model, _ = open_cache(shelf)
    read_text(model)
    off = started(model, shelf.checkpoint("olmoe", "4bit"), tmp_path, on=False)
    off.begin()
    off.save()
    assert (off.done, off.notes, off.lines(), list(tmp_path.iterdir())) == (None, [], [], [])


# ---- the command ----

STORY = "Tell me a story about a fox."


@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs `generate --json` on the demo model with a cache folder of its own."""

    def run(*argv: str) -> dict[str, Any]:
        flags = ["-p", STORY, "-m", "12", "--slots", "20", "--json", "--warm-start-folder", str(tmp_path / "cache")]
        assert main([*flags, *argv]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        result: dict[str, Any] = json.loads(out)
        return result

    return run


def noted(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.*"))


def test_the_second_run_begins_with_the_experts_of_the_first(
    generate: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    first, second = (generate("--warm-start", "--exact") for _ in range(2))
    assert first["warm_start"] == {"experts": 0, "bytes": 0, "seconds": 0.0, "notes": []}
    assert second["text"] == first["text"]
    assert second["warm_start"]["experts"] == 6 * 20 and second["warm_start"]["seconds"] > 0
    assert second["warm_start"]["bytes"] == 6 * 20 * 23040
    assert second["prefill"]["hits"] > 2 * first["prefill"]["hits"]
    assert second["prefill"]["loads"] < first["prefill"]["loads"]
    assert len(noted(tmp_path)) == 1


def test_a_warm_set_is_read_in_one_call(
    generate: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate("--warm-start")
    calls: list[int] = []
    read = ExpertReader.read

    def counted(reader: ExpertReader, requests: Sequence[ReadRequest]) -> None:
        calls.append(sum(len(r.view) for r in requests))
        read(reader, requests)

    monkeypatch.setattr(ExpertReader, "read", counted)
    warm = generate("--warm-start")["warm_start"]
    assert calls.count(warm["bytes"]) == 1 and max(calls) == warm["bytes"]


def test_other_slots_take_what_fits_and_more_slots_find_more(generate: Callable[..., dict[str, Any]]) -> None:
    generate("--warm-start", "--slots", "40", "-m", "40")
    assert generate("--warm-start", "--slots", "8", "-m", "1")["warm_start"]["experts"] == 6 * 8
    assert generate("--warm-start", "--slots", "40")["warm_start"]["experts"] > 6 * 20  # the short run forgot nothing


def test_without_the_flag_nothing_is_read_or_written(generate: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    assert generate()["warm_start"] is None and noted(tmp_path) == []
    generate("--warm-start")
    (before,) = noted(tmp_path)
    content = before.read_bytes()
    assert generate("--no-warm-start", "--slots", "40")["warm_start"] is None
    assert before.read_bytes() == content


def test_with_all_experts_in_memory_there_is_nothing_to_note(
    generate: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    assert generate("--warm-start", "--slots", "60")["warm_start"] is None and noted(tmp_path) == []


def test_a_broken_file_is_a_note_and_is_replaced(
    generate: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate("--warm-start")
    (file,) = noted(tmp_path)
    file.write_bytes(b"{")
    flags = ["-p", STORY, "-m", "2", "--slots", "20", "--warm-start", "--warm-start-folder", str(tmp_path / "cache")]
    assert main(flags) == 0
    err = capsys.readouterr().err
    assert err.count("\nno warm start: ") == 1 and "is damaged" in err and "Traceback" not in err
    assert json.loads(file.read_text())["format"] == warm_start.FORMAT
    assert main(flags) == 0
    assert re.search(r"\nwarm     1\d\d experts read ahead · 2\.\d\d MB in ", capsys.readouterr().err)


def test_a_folder_that_cannot_be_written_is_a_note(generate: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = generate("--warm-start", "--warm-start-folder", str(tmp_path / "file" / "cache"))
    assert result["text"] and any("the next start will be cold" in note for note in result["warm_start"]["notes"])


def test_the_first_run_says_that_there_is_nothing_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["-p", STORY, "-m", "2", "--slots", "20", "--warm-start-folder", str(tmp_path)]
    assert main([*flags, "--warm-start"]) == 0
    assert "warm     nothing to read ahead yet; the next run has" in capsys.readouterr().err.splitlines()
    assert main(flags) == 0
    assert "warm  " not in capsys.readouterr().err


def test_the_users_cache_folder_is_used_where_none_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["-p", STORY, "-m", "2", "--slots", "20", "--warm-start", "--json"]) == 0
    assert str(capsys.readouterr().out)
    (file,) = cache_folder().rglob("*.json")
    assert checkpoint_key(DEMO_MODEL).startswith(file.stem)


# ---- chat and server ----


def prefill_hits_of_a_chat(tmp_path: Path) -> float:
    """One message to `chat` in a terminal, then Ctrl-D; returns the hits of its prompt in percent."""
    pexpect = pytest.importorskip("pexpect")
    argv = ["-m", "mlx_moecache.chat", "--slots", "20", "-m", "8", "--exact", "--verbose"]
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "TERM": "dumb"}
    child = pexpect.spawn(sys.executable, argv, env=environment, dimensions=(40, 150), timeout=60, encoding="utf-8")
    child.expect_exact("> ")
    time.sleep(1.0)  # a person types; 2.8 MB are read in the meantime
    child.sendline(STORY)
    child.expect(r"([0-9.]+)% hit \([0-9,/]+\) prefill")
    hits = float(child.match.group(1))
    child.expect_exact("> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    return hits


def test_the_second_conversation_begins_warm(tmp_path: Path) -> None:
    cold, warm = (prefill_hits_of_a_chat(tmp_path) for _ in range(2))
    assert warm > 2 * cold


def test_a_server_begins_with_the_experts_of_the_last_one(tmp_path: Path) -> None:
    flags = ("--slots", "20", "--exact", "--warm-start", "--warm-start-folder", str(tmp_path))
    seen = []
    for _ in range(2):
        with ServerProcess(*flags) as server:
            time.sleep(0.5)  # nobody asks yet; 2.8 MB are read in the meantime
            body = {"messages": [{"role": "user", "content": STORY}], "max_tokens": 8}
            seen.append(ask(server.port, CHAT, body).json)
            assert server.end() == 130
    cold, warm = (x["usage"]["expert_cache"]["prefill"]["hits"] for x in seen)
    assert warm > 2 * cold
    assert seen[0]["choices"][0]["message"] == seen[1]["choices"][0]["message"]


# ---- the benchmark ----


def test_the_benchmark_compares_warm_starts_with_a_cold_one_over_the_same_prompts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    benchmark = importlib.import_module("warm_start")
    small = ["--lengths", "4", "--tokens", "4", "--rounds", "1", "--prompts", "2"]
    benchmark.main(["--slots", "20", "--flash", "1GB/s", "--routing", "original", *small])
    *shown, last = capsys.readouterr().out.splitlines()
    rows = {r["variant"]: r for r in json.loads(last)["rows"]}
    assert list(rows) == ["cold", "resident", "used", "stopped"] and len(shown) == 3 + len(rows)
    cold, resident = rows["cold"], rows["resident"]
    assert cold["first_typed"]["value"] == 1 and cold["megabytes"]["warm"] == 0
    assert resident["prefill_hit_rate"] > cold["prefill_hit_rate"]
    assert resident["megabytes"]["prefill"] < cold["megabytes"]["prefill"]
    assert resident["megabytes"]["warm"] == pytest.approx(6 * 20 * 23040 / 1e6)
    assert 0 < rows["stopped"]["megabytes"]["warm"] < resident["megabytes"]["warm"]
    total, before = (sum(r["megabytes"].values()) for r in (resident, cold))
    assert resident["all_bytes"]["value"] == pytest.approx(total / before)
    with pytest.raises(UsageError, match="below the 60 experts"):
        benchmark.main(["--slots", "60"])


def test_rounds_of_the_benchmark_are_no_new_stories_to_its_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    ratio_of_sums = importlib.import_module("warm_start").ratio_of_sums
    cold, warm = [10.0, 20.0, 30.0, 40.0], [9.0, 10.0, 33.0, 20.0]
    once = ratio_of_sums(cold, warm, 1)
    assert once.value == pytest.approx(72 / 100) and once.low < once.value < once.high
    repeated = ratio_of_sums(5 * cold, 5 * warm, 5)  # the same again adds no knowledge
    assert (repeated.value, repeated.low, repeated.high) == pytest.approx((once.value, once.low, once.high))
