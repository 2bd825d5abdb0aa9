"""benchmarks/equal_kl.py finds the ratio of misses that was put into made-up results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_moecache.study.result_metrics import Unit
from mlx_moecache.study.results import DataFacts, ModelFacts, Results, Run, Settings, save

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import equal_kl

WINDOWS = 30


def write(path: Path, families: dict[str, tuple[list[float], float]]) -> Path:
    """Families "strategy/eviction" -> (KL per token of each run, factor); misses fall as 100 * factor / sqrt(KL)."""
    model = ModelFacts("demo", "qwen2_moe", 60, 4, 6, 23040, "0")
    settings = Settings(64, 64, "all", "engine", "empty", WINDOWS, 0)
    results = Results(model, DataFacts("text", "x.txt", "0", WINDOWS), settings)
    rng = np.random.default_rng(0)
    size = rng.uniform(0.5, 2.0, WINDOWS)  # windows differ, in the same way for every run
    size /= size.mean()
    for name, (kls, factor) in families.items():
        strategy, _, eviction = name.partition("/")
        for i, kl in enumerate(kls):
            units = [
                Unit(w, 64, kl=64 * kl * size[w], misses=int(1000 * factor / kl**0.5 * size[w])) for w in range(WINDOWS)
            ]
            run = Run(f"{strategy}:x={i}", strategy, {"x": float(i), "j": 1.0}, 30, eviction, WINDOWS, units=units)
            results.runs.append(run)
    save(results, path)
    return path


def test_the_ratio_at_equal_kl_is_found_whatever_the_parameters_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(
        tmp_path / "r.json", {"price/lru": ([0.002, 0.01, 0.05], 0.8), "cache-prior/lru": ([0.001, 0.02], 1.0)}
    )
    argv = ["equal_kl.py", str(path), "--of", "price/lru", "--against", "cache-prior/lru"]
    monkeypatch.setattr(sys, "argv", argv)
    equal_kl.main()
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])["slots"][0]
    assert record["slots"] == 30 and "30 slots: misses of price/lru / cache-prior/lru at equal KL: 0.80" in out
    assert record["mean"]["value"] == pytest.approx(0.8, abs=0.01)
    assert record["mean"]["low"] - 1e-3 <= record["mean"]["value"] <= record["mean"]["high"] + 1e-3 < 0.9
    assert min(record["kl"]) == pytest.approx(0.002) and max(record["kl"]) == pytest.approx(0.02)


def test_curves_without_a_common_range_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "r.json", {"price/lru": ([0.1, 0.2], 1.0), "cache-prior/lru": ([0.001, 0.02], 1.0)})
    monkeypatch.setattr(sys, "argv", ["x", str(path), "--of", "price/lru", "--against", "cache-prior/lru"])
    assert equal_kl.run(equal_kl.main) == 2
    assert "no common range of KL" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["x", str(path), "--of", "price/decay", "--against", "cache-prior/lru"])
    assert equal_kl.run(equal_kl.main) == 0
    assert "fewer than two complete runs" in capsys.readouterr().err
