"""`mlx_moecache plot`: what the figures show, that labels keep clear, and how wrong input is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_moecache.errors import UsageError
from mlx_moecache.plot import main
from mlx_moecache.simulate import main as simulate
from mlx_moecache.study import figures
from mlx_moecache.study.figure_data import (
    METRICS,
    Panel,
    measured,
    merge,
    miss_rates,
    panels,
    simulated_miss_rates,
    usable,
)
from mlx_moecache.study.figure_style import SPARE_MARKERS, SPARE_STYLES, STYLES
from mlx_moecache.study.result_metrics import Unit
from mlx_moecache.study.results import DataFacts, ModelFacts, Results, Run, Settings, load, save
from mlx_moecache.study.trace import TraceWriter
from mlx_moecache.study.trace_format import TracedLayer, TraceHeader

pytest.importorskip("matplotlib")

TOKENS, K, LAYERS, EXPERTS = 256, 4, 6, 60
PARAMETERS: dict[str, tuple[str, Sequence[float]]] = {
    "pruning": ("k", (1, 2, 3)),
    "max-rank": ("m", (5, 6, 8, 12, 20, 40)),
    "cumsum": ("p", (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)),
    "cache-prior": ("strength", (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)),
    "mass-budget": ("delta", (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)),
    "bounded-regret": ("epsilon", (0.1, 0.2, 0.5, 1, 2, 4)),
    "price": ("delta", (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)),
}


def synthetic(
    *,
    slots: Sequence[int] = (15, 30, 45),
    evictions: Sequence[str] = ("lru",),
    parameters: Mapping[str, tuple[str, Sequence[float]]] = PARAMETERS,
    windows: int = 12,
    seed: int = 0,
) -> Results:
    """Results that look like those of a real sweep: fewer misses cost perplexity, more so with few slots."""
    rng = np.random.default_rng(seed)
    nll = TOKENS * rng.normal(2.0, 0.25, windows)
    selections = TOKENS * K * LAYERS
    runs = []

    def add(spec: str, values: dict[str, float], size: int, eviction: str, misses: float, loss: float) -> None:
        name = spec.partition(":")[0]
        run = Run(spec, name, values, size, eviction, windows)
        for i in range(windows):
            missed = int(selections * misses * rng.normal(1, 0.05))
            noise = rng.normal(0, 0.02 * math.sqrt(abs(loss)))
            unit = Unit(
                id=i, tokens=TOKENS, nll=nll[i] + TOKENS * (loss + noise), kl=TOKENS * abs(loss) * rng.normal(1, 0.1),
                top1=int(TOKENS * max(0.0, 1 - math.sqrt(abs(loss)))), selections=selections, misses=missed,
                loads=missed, swapped=1, token_layers=TOKENS * LAYERS, all_hit=9, lives=max(1, missed - size * LAYERS),
                life_tokens=max(1, missed - size * LAYERS) * int(size / (K * misses)), mass_lost=0.1,
                belady_misses=missed // 2 if name == "original" else None,
            )  # fmt: skip
            run.units.append(unit)
        runs.append(run)

    for eviction in evictions:
        for size in slots:
            base = 0.62 * (1 - size / EXPERTS) ** 1.1 * (1 if eviction == "lru" else 0.85)
            add("original", {}, size, eviction, base, 0.0)
            for strategy, (key, values) in parameters.items():
                for n, value in enumerate(values):
                    share = max(0.03, 0.85 - 0.13 * n)
                    loss = 0.0006 * math.exp(1.05 * n) * (30 / size)
                    if strategy == "pruning":
                        share, loss = math.sqrt(value / K), 0.12 * (K - value) ** 2
                    add(f"{strategy}:{key}={value}", {"j": 2, key: value}, size, eviction, base * share, loss)
    return Results(
        ModelFacts("demo", "qwen2_moe", EXPERTS, K, LAYERS, 138_240, "ab" * 32),
        DataFacts("text", "held_out.txt", "cd" * 32, windows),
        Settings(TOKENS, TOKENS, "all", "engine", "empty", None, 0),
        runs,
        "2026-01-01T00:00:00+00:00",
        {"mlx_moecache": "0.1.0"},
    )


SMALL = {"cache-prior": ("strength", (0.05, 0.1)), "price": ("delta", (0.01, 0.02))}


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*argv: object) -> tuple[int, str, str]:
        code = main([str(a) for a in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(command: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Runs a command that must fail: exit code 2, nothing on stdout, the reason on the last line of stderr."""

    def run(*argv: object) -> str:
        code, out, err = command(*argv)
        assert (code, out) == (2, ""), err
        assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
        return err.splitlines()[-1]

    return run


def stored(folder: Path, results: Results, name: str = "results.json") -> Path:
    save(results, folder / name)
    return folder / name


# ---- what is shown ----


def line_of(panel: Panel, strategy: str, eviction: str = "lru") -> Sequence[float | None]:
    (line,) = [x for x in panel.lines if (x.strategy, x.eviction) == (strategy, eviction)]
    return [p.value for p in line.points]


def test_a_panel_per_number_of_slots_has_a_line_per_strategy_ordered_by_its_parameter() -> None:
    results = synthetic()
    np.random.default_rng(1).shuffle(results.runs)  # type: ignore[arg-type]
    shown = panels(results, METRICS["perplexity"])
    assert [p.slots for p in shown] == [15, 30, 45]
    for panel in shown:
        assert {line.strategy for line in panel.lines} == set(PARAMETERS)
        for name, (_, values) in PARAMETERS.items():
            assert line_of(panel, name) == list(values)
        assert [len(line.points) for line in panel.exact] == [1]


def test_lines_of_a_strategy_differ_in_one_parameter_and_name_the_others() -> None:
    results = synthetic(slots=(30,), parameters={"cache-prior": ("strength", (0.05, 0.1, 0.2))})
    others = [replace(r, parameters={**r.parameters, "j": 1}, routing=r.routing + ",j=1") for r in results.runs[1:]]
    results.runs += others
    (panel,) = panels(results, METRICS["kl"])
    assert [(x.parameter, x.fixed, len(x.points)) for x in panel.lines] == [
        ("strength", (("j", 2),), 3),
        ("strength", (("j", 1),), 3),
    ]


def test_perplexity_is_relative_to_exact_routing_with_paired_intervals() -> None:
    results = synthetic(slots=(30,), parameters=SMALL)
    (panel,) = panels(results, METRICS["perplexity"])
    assert panel.exact[0].points[0].quality == 1
    run = results.find("cache-prior:strength=0.1", 30, "lru")
    exact = results.find("original", 30, "lru")
    assert run is not None and exact is not None
    ratio = math.exp(
        sum((a.nll or 0) - (b.nll or 0) for a, b in zip(run.units, exact.units, strict=True)) / (12 * TOKENS)
    )
    point = next(x for x in panel.lines if x.strategy == "cache-prior").points[1]
    assert point.quality == pytest.approx(ratio)
    assert point.low is not None and point.high is not None
    assert point.low < ratio < point.high
    # Windows differ by far more than strategies do: without pairing the interval would be ten times as wide.
    metric = run.metrics(results.model)
    assert metric["perplexity"] is not None and metric["perplexity_stderr"] is not None
    assert point.high - point.low < 0.4 * metric["perplexity_stderr"] / metric["perplexity"]


def test_misses_are_counted_by_what_the_model_selects_so_that_pruning_reads_less() -> None:
    results = synthetic(slots=(30,), parameters={"pruning": ("k", (2,))})
    exact, pruned = results.runs
    pruned.units = [replace(u, selections=TOKENS * 2 * LAYERS, misses=100) for u in pruned.units]
    (panel,) = panels(results, METRICS["kl"])
    assert panel.lines[0].points[0].miss_rate == 100 / (TOKENS * K * LAYERS)
    assert panel.exact[0].points[0].miss_rate == exact.metrics(results.model)["miss_rate"]


def test_exact_routing_measured_once_serves_as_reference_for_all_slot_counts() -> None:
    results = synthetic(slots=(15, 30), parameters=SMALL)
    results.runs = [r for r in results.runs if r.strategy != "original" or r.slots == 15]
    shown = panels(results, METRICS["perplexity"])
    assert [len(p.exact) for p in shown] == [1, 0]
    assert all(p.quality < 1.2 for line in shown[1].lines for p in line.points)


def test_the_belady_line_is_that_of_the_original_routes() -> None:
    results = synthetic(slots=(30,), parameters=SMALL)
    exact = results.runs[0]
    (panel,) = panels(results, METRICS["kl"])
    assert panel.belady == exact.metrics(results.model)["belady_miss_rate"]
    assert panel.exact[0].points[0].quality == 0


def test_miss_rates_come_by_eviction_policy_with_the_bound() -> None:
    series = miss_rates(synthetic(slots=(45, 15), evictions=("lru", "decay:0.98"), parameters=SMALL))
    assert list(series) == ["lru", "decay:0.98", "belady"]
    for points in series.values():
        assert [s for s, _ in points] == [15, 45]
    assert series["belady"][0][1] < series["decay:0.98"][0][1] < series["lru"][0][1]


def test_only_what_was_measured_is_a_metric() -> None:
    assert [m.name for m in measured(synthetic(parameters=SMALL, slots=(30,)))] == ["perplexity", "kl", "top1"]
    with pytest.raises(UsageError, match=r"no run has the metric accuracy \(measured: perplexity, kl, top1\)"):
        panels(synthetic(parameters=SMALL, slots=(30,)), METRICS["accuracy"])


def test_unfinished_and_failed_runs_are_left_out_and_counted() -> None:
    results = synthetic(slots=(30,), parameters=SMALL)
    del results.runs[1].units[-1:]
    results.runs[2].failed = "swapped nothing"
    kept, notes = usable(results)
    assert [r.routing for r in kept.runs] == [r.routing for r in (results.runs[0], *results.runs[3:])]
    assert notes == ["left out: 1 unfinished and 1 failed runs"]
    results.runs = results.runs[1:3]
    with pytest.raises(UsageError, match="no run is complete"):
        usable(results)


def test_files_are_merged_and_the_longer_of_equal_runs_counts() -> None:
    a, b = synthetic(slots=(15,), parameters=SMALL), synthetic(slots=(15, 30), parameters=SMALL)
    del a.runs[0].units[3:]
    together = merge([("a", a), ("b", b)])
    assert len(together.runs) == len(b.runs)
    assert all(r.complete for r in together.runs)


@pytest.mark.parametrize(
    ("part", "change"), [("model", {"experts": 64}), ("data", {"sha256": "00"}), ("settings", {"window": 8})]
)
def test_files_that_cannot_be_compared_are_refused(part: str, change: dict[str, object]) -> None:
    a = synthetic(slots=(15,), parameters=SMALL)
    b = replace(a, **{part: replace(getattr(a, part), **change)})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=rf"b and a differ in {part} \({next(iter(change))}\); plot them apart"):
        merge([("a", a), ("b", b)])
    moved = replace(a, model=replace(a.model, path="elsewhere"))
    assert len(merge([("a", a), ("moved", moved)]).runs) == len(a.runs)


# ---- pictures ----


def test_text_of_the_trade_off_figure_neither_overlaps_nor_leaves_the_picture() -> None:
    for count in (1, 3, 4):
        results = synthetic(slots=(8, 15, 30, 45)[-count:], evictions=("lru", "decay:0.98"))
        figure = figures.tradeoff(results, METRICS["kl"])
        figure.draw_without_rendering()
        frame = figure.bbox
        legend = figure.legends[0].get_window_extent()
        assert frame.x0 <= legend.x0 and legend.x1 <= frame.x1 and frame.y0 <= legend.y0
        for axes in figure.axes:
            box = axes.get_tightbbox()
            assert box is not None and frame.x0 <= box.x0 and box.x1 <= frame.x1 + 1 and box.y1 <= frame.y1 + 1
            assert not box.overlaps(legend)
            labels = [t.get_window_extent() for t in axes.texts]
            assert len(labels) > 6
            assert not any(a.overlaps(b) for i, a in enumerate(labels) for b in labels[:i])
            assert all(axes.bbox.x0 <= b.x0 and b.x1 <= axes.bbox.x1 for b in labels)


def test_labels_hide_no_point() -> None:
    figure = figures.tradeoff(synthetic(slots=(30,)), METRICS["kl"])
    (axes,) = figure.axes
    figure.draw_without_rendering()
    points = np.concatenate(
        [
            axes.transData.transform(np.column_stack(x.get_data()).astype(float))
            for x in axes.lines
            if x.get_marker() not in ("None", "*")
        ]
    )
    for text in axes.texts:
        box = text.get_window_extent()
        inside = (points[:, 0] > box.x0) & (points[:, 0] < box.x1) & (points[:, 1] > box.y0) & (points[:, 1] < box.y1)
        assert not inside.any(), text.get_text()


def test_points_far_above_are_counted_instead_of_flattening_the_rest() -> None:
    results = synthetic(slots=(30,))
    figure = figures.tradeoff(results, METRICS["perplexity"])
    (axes,) = figure.axes
    top = axes.get_ylim()[1]
    (panel,) = panels(results, METRICS["perplexity"])
    above = sum(p.quality > top for line in panel.lines for p in line.points)
    assert top < 1.1 and above > 3
    assert f"↑ {above} points above" in [t.get_text() for t in axes.texts]


def test_strategies_differ_in_marker_and_in_brightness_or_colour() -> None:
    markers = [marker for _, marker in STYLES.values()]
    assert len({*markers, *SPARE_MARKERS}) == len(markers) + len(SPARE_MARKERS)
    assert len({*markers, *(m for _, m in SPARE_STYLES)}) == len(markers) + len(SPARE_STYLES)
    assert len({colour for colour, _ in STYLES.values()}) == len(markers)


def test_the_heat_map_shows_shares_and_layers_with_fewer_experts() -> None:
    figure = figures.heatmap([np.array([3, 1, 0, 0]), np.array([1, 1])])
    image = figure.axes[0].images[0].get_array()
    assert np.ma.filled(image, np.nan).tolist()[0] == [3, 1, 0, 0]
    assert np.ma.filled(image, np.nan).tolist()[1][:2] == [1, 1]
    assert np.isnan(np.ma.filled(image, np.nan)[1, 2:].astype(float)).all()


# ---- the command ----


def recorded(path: Path) -> Path:
    """A trace of two layers and three tokens."""
    shape = TracedLayer(experts=4, k=2, bytes_per_expert=100, slots=4, ranked=4)
    header = TraceHeader("tiny", "tiny", "ab", (shape, shape), routing="original", eviction="lru")
    own = np.array([[0, 1], [1, 2], [1, 0]], dtype=np.int32)
    with TraceWriter(path, header) as writer:
        for layer in range(2):
            writer.record(layer, "decode", None, own, own, steps=True)
    return path


def test_a_heat_map_is_drawn_from_a_trace(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command(recorded(tmp_path / "run.trace"), "--out", out) == (0, f"{out / 'heatmap.png'}\n", "")


def test_results_and_a_trace_together_give_all_four_figures(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    file = stored(tmp_path, synthetic(slots=(15, 30), parameters=SMALL))
    code, printed, _ = command(file, recorded(tmp_path / "run.trace"), "--metric", "kl", "--out", tmp_path)
    assert code == 0
    assert [Path(x).stem for x in printed.splitlines()] == ["tradeoff-kl", "slots", "lifetime", "heatmap"]


def test_what_simulate_prints_becomes_miss_rate_against_slots(
    command: Callable[..., tuple[int, str, str]],
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    trace, file, out = recorded(tmp_path / "run.trace"), tmp_path / "simulated.json", tmp_path / "s.png"
    assert simulate([str(trace), "--slots", "2,3,4", "--eviction", "lru,belady", "--json"]) == 0
    file.write_text(capsys.readouterr().out)
    series, experts = simulated_miss_rates(file)
    assert experts == 4 and [[s for s, _ in points] for points in series.values()] == [[2, 3, 4], [2, 3, 4]]
    assert command(file, "--what", "slots", "--out", out) == (0, f"{out}\n", "")
    assert "--what lifetime needs results of evaluate or sweep" in refused(file, "--what", "lifetime", "--out", out)
    file.write_text('{"format": "mlx_moecache.simulation"}')
    assert "is not what simulate --json prints" in refused(file, "--what", "slots", "--out", out)


def test_a_folder_gets_every_figure_that_the_file_allows(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "plots"
    code, printed, err = command(stored(tmp_path, synthetic(slots=(15, 30), parameters=SMALL)), "--out", out)
    names = ["tradeoff-perplexity", "tradeoff-kl", "tradeoff-top1", "slots", "lifetime"]
    assert (code, err) == (0, "")
    assert printed.splitlines() == [str(out / f"{n}.png") for n in names]
    assert sorted(p.name for p in out.iterdir()) == sorted(f"{n}.png" for n in names)
    for name in names:
        width = int.from_bytes((out / f"{name}.png").read_bytes()[16:20], "big")
        assert width >= 1000


def test_what_cannot_be_drawn_is_named_and_the_rest_is_drawn(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, printed, err = command(stored(tmp_path, synthetic(slots=(15,), parameters=SMALL)), "--out", tmp_path)
    assert code == 0 and len(printed.splitlines()) == 4
    assert (
        err == "not drawn: slots (miss rate against slots needs original routing with at least two numbers of slots)\n"
    )


def test_one_picture_as_svg_is_the_same_every_time(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    file, out = stored(tmp_path, synthetic(slots=(15,), parameters=SMALL)), tmp_path / "kl.svg"
    assert command(file, "--metric", "kl", "--out", out)[0] == 0
    first = out.read_bytes()
    assert b"<svg" in first
    assert command(file, "--metric", "kl", "--out", out) == (0, f"{out}\n", "")
    assert out.read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kl.svg", "results.json"]  # no temporary files


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--out", "x.pdf"], "--out: .pdf files are not written; end the name in .png or .svg"),
        (["--what", "tradeof"], "unknown value 'tradeof' (choose tradeoff, slots, lifetime, heatmap)"),
        (["--metric", "bleu"], "(choose perplexity, kl, accuracy, top1)"),
        (["--metric", "accuracy", "--what", "tradeoff"], "no run has the metric accuracy"),
        (["--what", "slots"], "at least two numbers of slots"),
        (["--what", "heatmap"], "recorded with --trace"),
        (["--outt", "x"], "unknown flag --outt, did you mean --out?"),
    ],
)
def test_wrong_flags_are_one_line(
    flags: list[str], part: str, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert part in refused(stored(tmp_path, synthetic(slots=(15,), parameters=SMALL)), *flags)
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_files_that_are_no_results_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    file = stored(tmp_path, synthetic(slots=(15,), parameters=SMALL))
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "version": 2}))
    assert "version 2" in refused(file)
    file.write_text("{")
    assert "not JSON" in refused(file)
    file.write_bytes(b"\xff\xfe\x00")
    assert "not" in refused(file)
    assert "No such file" in refused(tmp_path / "missing.json")
    assert "directory" in refused(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    file = stored(tmp_path, synthetic(slots=(15,), parameters=SMALL))
    assert "is a file, but no picture" in refused(file, "--out", file)
    assert "cannot make the folder" in refused(file, "--out", file / "below")
    assert load(file).runs


def test_a_picture_that_cannot_be_written_leaves_the_old_one(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = stored(tmp_path, synthetic(slots=(15,), parameters=SMALL)), tmp_path / "old.png"
    out.write_bytes(b"old")

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert "No space left" in refused(file, "--out", out)
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old.png", "results.json"]


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path: Path) -> None:
    file = stored(tmp_path, synthetic(slots=(15,), parameters=SMALL))
    code = (
        "import sys; sys.modules['matplotlib'] = None; from mlx_moecache.plot import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, timeout=60, check=False
    )
    line = 'error: plots need matplotlib, which is not installed; run pip install "mlx-moecache[plot]"\n'
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_the_real_command_needs_no_display_and_prints_only_names(tmp_path: Path) -> None:
    file = stored(tmp_path, synthetic(slots=(15, 30), parameters=SMALL, windows=4))
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    done = subprocess.run(
        [sys.executable, "-m", "mlx_moecache", "plot", file.name, "--what", "slots", "--out", "s.png"],
        capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path,
        env={**environment, "MPLBACKEND": "TkAgg"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "s.png\n", "")
