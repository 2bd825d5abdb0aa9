"""The benchmarks in tiny settings: they run, their records parse, and their arithmetic is right."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from tiny_models import Shelf

from mlx_moecache.errors import UsageError

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import cache_prior
import cache_prior_runs
import common
import decode_speed
import held_out
import server_speed

LENGTH = 48  # tokens per window: one block of two segments, and a rest


@pytest.fixture(scope="module")
def model(shelf: Shelf) -> Path:
    return shelf.checkpoint("qwen2_moe", num_hidden_layers=2)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Four documents of 200 letters each."""
    rng = np.random.default_rng(0)
    documents = ["".join(chr(97 + i) for i in rng.integers(26, size=200)) for _ in range(4)]
    path = tmp_path / "stories.txt"
    path.write_text("<|endoftext|>".join(documents))
    return path


def record_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The record: the last line of stdout."""
    record: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return record


# ---- decode_speed ----


def test_decode_speed_compares_four_ways_and_a_control_on_the_same_tokens(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decode_speed.main(["--model", str(model), "--rounds", "2", "--tokens", "3", "--json"])
    captured = capsys.readouterr()
    assert captured.err == ""
    (line,) = captured.out.splitlines()
    record = json.loads(line)
    results = record["results"]
    assert [(r["what"], r["routing"]) for r in results] == [
        (what, routing) for routing in ("original", "cache-prior", "control") for what in ("step", "stream")
    ]
    assert all(r["same_tokens"] for r in results)
    assert all(r["ratio"]["low"] <= r["ratio"]["value"] <= r["ratio"]["high"] for r in results)
    assert all(r["stock_tps"] > 0 and r["ours_tps"] > 0 for r in results)
    assert record["benchmark"] == "decode_speed" and record["model"] == model.name


@pytest.mark.parametrize(
    ("ours", "routing", "met"),
    [(1.01, "original", True), (1.06, "original", False), (1.06, decode_speed.CONTROL, None)],
)
def test_the_target_is_judged_by_the_interval(ours: float, routing: str, met: bool | None) -> None:
    result = decode_speed.compare("step", routing, lambda: segment(1.0), lambda: segment(ours), 5, show=False)
    assert result.ratio.value == result.fastest_ratio.value == pytest.approx(1 / ours)
    assert result.met is met
    assert result.stock_tps == 2 and result.same_tokens


def test_a_wide_interval_decides_nothing() -> None:
    seconds = iter([1.0, 0.5, 2.0] * 40)
    result = decode_speed.compare("step", "original", lambda: segment(1.0), lambda: segment(next(seconds)), 9, False)
    assert result.met is None and "too noisy" in result.verdict


def test_different_tokens_are_noticed() -> None:
    result = decode_speed.compare(
        "step", "original", lambda: segment(1.0), lambda: decode_speed.Segment(1.0, (1, 3)), 2, show=False
    )
    assert not result.same_tokens and "DIFFERENT" in decode_speed.describe([result])


def segment(seconds: float) -> decode_speed.Segment:
    return decode_speed.Segment(seconds, (1, 2))


# ---- cache_prior ----


def test_cache_prior_reports_quality_and_speed_of_every_strength(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"--model {model} --text {text} --tail 1 --windows 4 --window {LENGTH} --strengths 1 --flash-ratio 4"
    cache_prior.main([*arguments.split(), "--tokens", "64"])
    record = record_of(capsys)
    original, biased = record["quality"]
    assert record["slots"] == 8 and record["experts"] == 16
    assert original["tokens"] == biased["tokens"] == 4 * LENGTH
    assert original["perplexity"]["value"] == pytest.approx(stock_perplexity(model, text), rel=1e-4)
    assert original["swapped_share"] == original["kl"]["value"] == 0
    assert original["perplexity_ratio"]["value"] == original["top1_agreement"]["value"] == 1
    assert biased["swapped_share"] > 0 and biased["kl"]["value"] > 0
    assert biased["misses_ratio"]["value"] < 1
    assert biased["loads_per_token_layer"] == pytest.approx(4 * biased["miss_rate"]["value"])
    (run,) = record["speed"]
    assert [s["strength"] for s in run["speeds"]] == [0, 1]
    assert all(s["tokens"] == 64 for s in run["speeds"])
    assert run["speeds"][0]["read_share"] > 0.3  # the flash really is slow
    assert run["speeds"][1]["loads_per_token_layer"] < run["speeds"][0]["loads_per_token_layer"]


def stock_perplexity(model: Path, text: Path) -> float:
    """By stock mlx-lm, one forward pass per window."""
    stock = Shelf(model.parent).stock(model)
    windows = held_out.text_windows([text], load_tokenizer(model), tail=1, count=4, length=LENGTH)
    ids = mx.array(windows)
    return math.exp(nn.losses.cross_entropy(stock(ids[:, :-1]), ids[:, 1:], reduction="mean").item())


def test_a_new_window_finds_no_expert_but_the_running_mean(model: Path) -> None:
    setup = cache_prior_runs.Setup(model, 8, LENGTH, (0.0, 0.1))
    biased = setup.load()[1]
    cache_prior_runs.decode(biased, make_prompt_cache(biased), np.arange(5, dtype=np.int32))
    cache_prior_runs.empty(biased.expert_cache)
    for layer in biased.expert_cache.layers:
        assert len(layer.residents) == 0
        assert layer.range.tokens == 5 and float(layer.range.total) > 0


def test_strength_0_has_original_routing(model: Path) -> None:
    setup = cache_prior_runs.Setup(model, 8, LENGTH, (0.0, 0.1))
    assert [m.expert_cache.strategy.name for m in setup.load()] == ["original", "cache-prior"]


def test_speeds_follow_from_sums() -> None:
    # Seconds, seconds of reads, loads, bytes per block of two segments; two layers.
    original = np.array([[4.0, 2.0, 80.0, 1.0], [4.0, 2.0, 80.0, 1.0]])
    biased = np.array([[3.0, 1.0, 40.0, 1.0], [3.0, 1.0, 40.0, 1.0]])
    speed = cache_prior_runs.summarise_speed(0.1, original, biased, layers=2)
    assert speed.tps.value == pytest.approx(2 * cache_prior_runs.BLOCK / 6)
    assert speed.ratio.value == pytest.approx(4 / 3) and speed.ratio_quartiles == pytest.approx((4 / 3, 4 / 3))
    assert speed.read_share == pytest.approx(1 / 3)
    assert speed.expected_ratio == pytest.approx(4 / 3)  # half the loads: one second less of four
    assert speed.loads_per_token_layer == pytest.approx(80 / (2 * cache_prior_runs.BLOCK) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--windows 99", "hold 16 windows of 48, not 99"),
        ("--window 16", "--window must be at least 32"),
        ("--flash-ratio 0", "--flash-ratio must be above 0"),
        ("--tail 0.001", "too short"),
        ("--slots 3", "3 slots"),
        ("--slots 16", "--slots must be below the 16 experts"),
        ("--text nowhere.txt", "cannot read nowhere.txt"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    model: Path, text: Path, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    defaults = f"--model {model} --text {text} --tail 1 --windows 1 --window {LENGTH} --json"
    code = common.run(lambda: cache_prior.main([*defaults.split(), *arguments.split()]))
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and len(captured.err.splitlines()) == 1
    assert message in captured.err


# ---- server_speed ----


@pytest.mark.parametrize("only", [True, False])
def test_the_last_line_of_server_speed_is_its_record(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], only: bool
) -> None:
    ratio = common.Estimate(1.0, 0.99, 1.01)
    result = server_speed.Result("server", ratio, ratio, (0.99, 1.01), 50.0, 50.0, True, 2)
    monkeypatch.setattr(server_speed, "measure", lambda folder, **options: [result])
    server_speed.main(["--model", str(model), *(["--json"] if only else [])])
    *lines, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert record["benchmark"] == "server_speed" and record["results"][0]["ratio"]["value"] == 1.0
    assert (lines == []) == only and (only or lines[-1] == "target 0.97: met")


# ---- expert_reads ----


def test_expert_reads_measures_both_temperatures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expert_reads = importlib.import_module("expert_reads")
    monkeypatch.setattr(expert_reads, "HIDDEN", 512)
    monkeypatch.setattr(expert_reads, "INTERMEDIATE", 384)
    monkeypatch.setattr(sys, "argv", ["expert_reads.py", "--folder", str(tmp_path), "--gb", "0.001", "--rounds", "1"])
    expert_reads.main()
    record = record_of(capsys)
    assert record["benchmark"] == "expert_reads"
    assert [r["temperature"] for r in record["results"]] == ["direct", "warm"]


# ---- text and intervals ----


def test_the_tail_is_whole_documents_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a" * 60 + "<|endoftext|>" + "b" * 20 + "\n<|endoftext|>\n" + "c" * 20 + "<|endoftext|>")
    assert held_out.held_out(path, 0.2) == ["c" * 20]
    assert held_out.held_out(path, 0.5) == ["b" * 20, "c" * 20]
    assert held_out.held_out(path, 1.0) == ["a" * 60, "b" * 20, "c" * 20]


def test_the_tail_of_a_book_begins_at_a_line(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n".join("0123456789"[i] * 9 for i in range(10)))
    assert held_out.held_out(path, 0.25) == ["8" * 9 + "\n" + "9" * 9]


def test_windows_do_not_overlap_and_cover_every_file(model: Path, tmp_path: Path) -> None:
    texts = ["".join(f"{name}{i:03d}" for i in range(100)) for name in "ab"]  # 400 tokens each, nothing twice
    for name, content in zip("ab", texts, strict=True):
        (tmp_path / name).write_text(content)
    paths, tokenizer = [tmp_path / "a", tmp_path / "b"], load_tokenizer(model)
    windows = held_out.text_windows(paths, tokenizer, tail=1, count=16, length=50)
    assert windows.shape == (16, 51)
    stream = tokenizer.eos_token.join(texts)
    starts = [stream.replace(tokenizer.eos_token, "|").index(decoded(w, tokenizer)) for w in windows]
    assert all(b - a >= 50 for a, b in itertools.pairwise(starts))
    assert starts[0] == 0 and starts[-1] >= 750
    with pytest.raises(UsageError, match="hold 16 windows of 50, not 17"):
        held_out.text_windows(paths, tokenizer, tail=1, count=17, length=50)


def decoded(ids: held_out.Ids, tokenizer: TokenizerWrapper) -> str:
    return str(tokenizer.decode(ids[:-1].tolist())).replace(tokenizer.eos_token, "|")


def test_intervals_are_reproducible_and_shrink_with_more_rows() -> None:
    values = np.random.default_rng(1).normal(1.0, 0.1, size=400)
    few, many = common.bootstrap(values[:20], common.median), common.bootstrap(values, common.median)
    assert many == common.bootstrap(values, common.median)
    assert many.low <= many.value <= many.high
    assert many.high - many.low < 0.5 * (few.high - few.low)
    # The mean of 400 values with deviation 0.1 has a standard error of 0.005.
    mean = common.bootstrap(values, lambda v: float(v.mean()))
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * 0.005, rel=0.15)


def test_pairs_stay_paired() -> None:
    base = np.random.default_rng(2).uniform(1, 100, size=30)
    ratio = common.bootstrap(np.stack([base, 2 * base], axis=1), lambda p: float(p[:, 1].sum() / p[:, 0].sum()))
    assert ratio.low == pytest.approx(2) and ratio.high == pytest.approx(2)
