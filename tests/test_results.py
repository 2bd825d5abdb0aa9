"""Results: what a file keeps, which files are refused, metrics and intervals against NumPy written out."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_moecache.errors import UsageError
from mlx_moecache.study.result_metrics import Unit, metrics, paired_units
from mlx_moecache.study.result_table import RunningMetric, heading, table
from mlx_moecache.study.results import DataFacts, ModelFacts, Results, Run, Settings, as_json, load, paired, save

MODEL = ModelFacts("models/a", "qwen2_moe", 60, 4, 6, 1000, "c" * 64)
DATA = DataFacts("text", "texts/b.txt", "d" * 64, 9)
SETTINGS = Settings(64, 64, "all", "engine", "empty", None, 0)


def window(id: int, nll: float, *, tokens: int = 64, misses: int = 300, **more: Any) -> Unit:
    facts: dict[str, Any] = {
        "kl": 0.1 * tokens,
        "top1": tokens - 3,
        "selections": 4 * 6 * tokens,
        "misses": misses,
        "loads": misses,
        "swapped": 12,
        "token_layers": 6 * tokens,
        "all_hit": 200,
        "lives": 10,
        "life_tokens": 250,
        "mass_lost": 1.5,
        "belady_misses": 100,
    }
    return Unit(id=id, tokens=tokens, nll=nll, **{**facts, **more})


def make_run(routing: str = "original", units: list[Unit] | None = None, n: int = 3) -> Run:
    if units is None:
        units = [window(0, 150.0), window(1, 170.0, misses=280), window(2, 160.0)]
    return Run(routing, routing.partition(":")[0], {"strength": 0.1}, 30, "lru", n, units=units)


def make_results(*runs: Run) -> Results:
    return Results(MODEL, DATA, SETTINGS, list(runs))


# ---- files ----


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    first = make_run("cache-prior:strength=0.1,j=2")
    first.ranges = [[12.3, 64], [0.1 + 0.2, 64]]
    second = make_run("original", [Unit(id=5, tokens=9, correct=1, scores={"strict": 1, "flexible": 0})], n=4)
    second.failed = "swapped nothing"
    results = make_results(first, second)
    save(results, tmp_path / "r.json")
    assert load(tmp_path / "r.json") == results


def test_a_file_states_format_metrics_and_which_runs_are_complete(tmp_path: Path) -> None:
    broken = make_run("price")
    broken.failed = "swapped nothing"
    save(make_results(make_run(), make_run("cache-prior", n=4), broken), tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    assert (data["format"], data["version"]) == ("mlx_moecache.results", 1)
    assert [r["complete"] for r in data["runs"]] == [True, False, False]
    assert data["runs"][0]["metrics"]["perplexity"] == pytest.approx(math.exp(480 / 192))
    assert data["runs"][0]["metrics"]["accuracy"] is None
    assert "correct" not in data["runs"][0]["units"][0]  # what was not measured is absent
    assert data["packages"].keys() >= {"mlx_moecache", "mlx", "mlx-lm"}


def test_saving_that_fails_leaves_the_earlier_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.json"
    save(make_results(make_run()), path)
    before = path.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UsageError, match=r"cannot write .*No space left"):
        save(make_results(make_run("price")), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_saving_where_there_is_no_folder_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot write .*nowhere"):
        save(make_results(), tmp_path / "nowhere" / "r.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "version 2, this mlx_moecache reads version 1"),
        (lambda d: d.update(format="other"), "not a results file of mlx_moecache"),
        (lambda d: d.pop("settings"), "damaged .*settings"),
        (lambda d: d["runs"][0]["units"][0].update(surprise=1), "damaged .*surprise"),
        (lambda d: d.update(runs=None), "damaged"),
        (lambda d: d["model"].pop("k"), "damaged"),
    ],
)
def test_files_of_another_format_or_version_and_damaged_ones_are_refused(
    tmp_path: Path, change: Any, message: str
) -> None:
    data = as_json(make_results(make_run()))
    change(data)
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match=message):
        load(tmp_path / "r.json")


@pytest.mark.parametrize(("content", "message"), [("{", "not JSON"), ("[1]", "not a results file"), ("\xff", "not")])
def test_files_that_are_something_else_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "r.json").write_text(content, encoding="latin-1")
    with pytest.raises(UsageError, match=message):
        load(tmp_path / "r.json")
    with pytest.raises(UsageError, match="cannot read"):
        load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda r: replace(r, model=replace(MODEL, config_sha256="e" * 64)), "model config_sha256 was eeee.*is cccc"),
        (lambda r: replace(r, data=replace(DATA, sha256="e" * 64)), "data sha256"),
        (lambda r: replace(r, settings=replace(SETTINGS, window=128)), "settings window was 128, is 64"),
        (lambda r: replace(r, packages={**r.packages, "mlx": "0.1"}), "package mlx was 0.1, is"),
        (lambda r: replace(r, packages={**r.packages, "other": "1"}), "package other was 1, is None"),
    ],
)
def test_results_of_something_else_cannot_be_continued(other: Any, message: str) -> None:
    results = make_results()
    with pytest.raises(UsageError, match=f"r.json holds results of another evaluation .*{message}"):
        results.check_continues(other(results), "r.json")


def test_results_can_be_continued_after_model_and_data_moved() -> None:
    moved = replace(make_results(), model=replace(MODEL, path="elsewhere"), data=replace(DATA, path="elsewhere"))
    make_results().check_continues(moved, "r.json")


def test_a_run_is_found_by_routing_slots_and_eviction() -> None:
    run = make_run()
    results = make_results(run)
    assert results.find_or_append(make_run()) is run
    assert results.find("original", 31, "lru") is None and results.find("original", 30, "lfu") is None
    new = replace(make_run(), slots=45)
    assert results.find_or_append(new) is new and results.runs == [run, new]


# ---- metrics ----


def test_metrics_are_ratios_of_sums() -> None:
    m = make_run().metrics(MODEL)
    tokens = 3 * 64
    assert m["perplexity"] == pytest.approx(math.exp((150 + 170 + 160) / tokens))
    assert m["kl"] == pytest.approx(0.1) and m["top1_agreement"] == pytest.approx(61 / 64)
    assert m["miss_rate"] == pytest.approx(880 / (tokens * 24))
    assert m["loads_per_token"] == pytest.approx(880 / tokens)
    assert m["bytes_per_token"] == pytest.approx(1000 * 880 / tokens)
    assert m["expert_lifetime"] == 25 and m["all_hit_share"] == pytest.approx(600 / (6 * tokens))
    assert m["swapped_share"] == pytest.approx(36 / (tokens * 24))
    assert m["mass_lost"] == pytest.approx(4.5 / (6 * tokens))
    assert m["belady_miss_rate"] == pytest.approx(300 / (tokens * 24))


def test_belady_misses_are_of_the_selections_of_original_routing() -> None:
    units = [window(0, 1.0, belady_misses=90), window(1, 1.0, belady_misses=30, own_selections=500)]
    pairs = [u.token_layers for u in units]
    assert pairs[0] is not None  # earlier files do not say; every token selected k experts
    rate = metrics(units, layers=6, k=4, bytes_per_expert=1000)["belady_miss_rate"]
    assert rate == pytest.approx(120 / (4 * pairs[0] + 500))


def test_the_standard_error_of_perplexity_agrees_with_a_simulation() -> None:
    rng = np.random.default_rng(1)

    def sample() -> list[Unit]:
        tokens = rng.integers(20, 100, size=50)
        return [window(i, float(t * (2 + rng.normal(0, 0.3))), tokens=int(t)) for i, t in enumerate(tokens)]

    many = [metrics(sample(), layers=6, k=4, bytes_per_expert=1) for _ in range(400)]
    spread = np.std([m["perplexity"] for m in many])
    assert np.mean([m["perplexity_stderr"] for m in many]) == pytest.approx(spread, rel=0.15)


def test_accuracy_has_the_standard_error_of_a_mean_of_zeros_and_ones() -> None:
    units = [Unit(id=i, tokens=1, correct=int(i < 3), scores={"flexible": 1}) for i in range(10)]
    m = metrics(units, layers=1, k=4, bytes_per_expert=1)
    assert m["accuracy"] == pytest.approx(0.3)
    assert m["accuracy_stderr"] == pytest.approx(math.sqrt(0.3 * 0.7 / 9))
    assert (m["accuracy_flexible"], m["accuracy_flexible_stderr"]) == (1.0, 0.0)
    assert m["perplexity"] is None and m["miss_rate"] is None


def test_metrics_of_nothing_and_of_one_unit_are_none_where_they_are_not_known() -> None:
    assert set(metrics([], layers=6, k=4, bytes_per_expert=1).values()) == {None}
    one = metrics([window(0, 150.0)], layers=6, k=4, bytes_per_expert=1)
    assert one["perplexity"] is not None and one["perplexity_stderr"] is None and one["kl_stderr"] is None
    never = metrics([window(0, 1e6, misses=0, lives=0, life_tokens=0)], layers=6, k=4, bytes_per_expert=1)
    assert never["perplexity"] is None and never["expert_lifetime"] is None and never["miss_rate"] == 0


@given(st.permutations(range(5)), st.integers(1, 4))
def test_metrics_do_not_depend_on_order_nor_on_where_windows_are_cut(order: list[int], at: int) -> None:
    units = [window(i, 100.0 + i, misses=200 + i) for i in range(5)]
    whole = metrics(units, layers=6, k=4, bytes_per_expert=7)
    shuffled = metrics([units[i] for i in order], layers=6, k=4, bytes_per_expert=7)
    assert shuffled == pytest.approx(whole)
    joined = replace(
        units[at],
        **{
            name: getattr(units[at - 1], name) + value
            for name, value in vars(units[at]).items()
            if name != "id" and value is not None
        },
    )
    fewer = metrics([*units[: at - 1], joined, *units[at + 1 :]], layers=6, k=4, bytes_per_expert=7)
    same = {k: v for k, v in whole.items() if not k.endswith("stderr")}
    assert {k: fewer[k] for k in same} == pytest.approx(same)


# ---- comparison ----


def test_paired_intervals_cover_the_truth_and_are_narrower_than_unpaired_ones() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(2.5, 0.5, size=60)  # windows differ much more than strategies
    a = [window(i, 64 * h) for i, h in enumerate(hard)]
    b = [window(i, 64 * (h + 0.01 + rng.normal(0, 0.01)), misses=150) for i, h in enumerate(hard)]
    p = paired_units(a, b)
    assert p.units == 60 and p.perplexity_ratio is not None and p.miss_ratio is not None
    assert p.perplexity_ratio.low < math.exp(0.01) < p.perplexity_ratio.high
    assert p.perplexity_ratio.high - p.perplexity_ratio.low < 0.01  # unpaired: about 0.3
    assert (p.miss_ratio.low, p.miss_ratio.value, p.miss_ratio.high) == (0.5, 0.5, 0.5)
    assert p.accuracy_difference is None


def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(100):
        a = [window(i, 64 * 2.5) for i in range(40)]
        b = [window(i, 64 * (2.5 + rng.normal(0.02, 0.05))) for i in range(40)]
        interval = paired_units(a, b).perplexity_ratio
        assert interval is not None
        covered += interval.low < math.exp(0.02) < interval.high
    assert 86 <= covered <= 100


def test_comparison_uses_common_units_only_whatever_their_order() -> None:
    a = make_run(units=[window(i, 100.0 + i) for i in range(6)])
    b = make_run("price", units=[window(i, 101.0 + i) for i in (5, 9, 2, 4)])
    p = paired(a, b)
    assert p.units == 3 and p.perplexity_ratio is not None
    assert p.perplexity_ratio.value == pytest.approx(math.exp(3 / 192))
    assert paired(a, b) == p  # the same draws


def test_runs_without_common_units_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match="share 1 units"):
        paired(make_run(), make_run(units=[window(2, 1.0), window(7, 1.0)]))


def test_accuracy_is_compared_question_by_question() -> None:
    a = [Unit(id=i, tokens=1, correct=i % 2) for i in range(40)]
    b = [Unit(id=i, tokens=1, correct=int(i % 2 or i == 0)) for i in range(40)]
    difference = paired_units(a, b).accuracy_difference
    assert difference is not None
    assert difference.value == pytest.approx(1 / 40) and difference.low == 0 and difference.high < 0.1


# ---- as text ----


def test_the_table_shows_what_is_known_and_compares_with_original_routing() -> None:
    lines = table(MODEL, [make_run(), make_run("cache-prior", [window(i, 161.0, misses=150) for i in range(3)])])
    assert "accuracy" not in lines[0] and "eviction" not in lines[0]
    original, biased = lines[1], lines[2]
    assert original.startswith("original") and " 12.182 ±" in original
    assert biased.startswith("cache-prior") and "1.0157 [" in biased and "0.511 [" in biased
    assert len(lines) == 3


def test_a_narrow_terminal_gets_a_list_per_run_that_fits() -> None:
    runs = [make_run(), make_run("cache-prior:strength=0.1,j=2")]
    lines = table(MODEL, runs, 60)
    assert max(map(len, lines)) <= 60
    assert [x for x in lines if not x.startswith(" ")] == [r.routing for r in runs]
    assert sum("perplexity" in x for x in lines) == 2


def test_the_table_says_what_is_incomplete_or_failed() -> None:
    broken, part = make_run("price"), make_run("cache-prior", n=40)
    broken.failed = "price swapped nothing"
    lines = table(MODEL, [broken, part])
    assert lines[-2:] == ["FAILED: price swapped nothing", "incomplete: cache-prior (3 of 40)"]


def test_the_heading_names_model_data_and_settings() -> None:
    text = "\n".join(heading(make_results()))
    for part in ("a (qwen2_moe)", "6 layers of 60 experts, 4 per token", "b.txt", "dddddddddddd", "64 tokens", "all"):
        assert part in text


def test_the_running_metric_agrees_with_the_final_one() -> None:
    metric = RunningMetric()
    assert str(metric) == ""
    run = make_run()
    for unit in run.units:
        metric.add(unit)
    final = run.metrics(MODEL)
    assert str(metric) == f"ppl {final['perplexity']:.4g}, miss {final['miss_rate']:.1%}"
    assert str(RunningMetric([Unit(id=0, tokens=1, correct=1), Unit(id=1, tokens=1, correct=0)])) == "acc 50.0%"
