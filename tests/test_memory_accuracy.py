"""The benchmark of the plan's accuracy: its synthetic checkpoint, its table, and a run on the demo model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mlx_moecache.checkpoints.checkpoint import DTYPES
from mlx_moecache.checkpoints.skeleton import write_sparse
from mlx_moecache.demo import demo_model
from mlx_moecache.errors import UsageError
from mlx_moecache.loading import OpenedModel

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def memory_accuracy(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import memory_accuracy

    return memory_accuracy


def test_the_synthetic_checkpoint_is_one_that_opens(memory_accuracy: object, tmp_path: Path) -> None:
    tensors = memory_accuracy.tensors_of(memory_accuracy.QWEN, 2)  # type: ignore[attr-defined]
    config = {**memory_accuracy.QWEN, "num_hidden_layers": 2}  # type: ignore[attr-defined]
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_sparse(tmp_path / "model.safetensors", tensors)
    opened = OpenedModel(tmp_path)
    expert = 3 * 2048 * 1408 * 4.5 / 8  # 4 bits, and a bfloat16 scale and bias for each 64 weights
    assert [(x.num_experts, x.k, x.bytes_per_expert) for x in opened.layer_shapes] == [(60, 4, expert)] * 2
    size = sum(math.prod(shape) * DTYPES[dtype][0] // 8 for dtype, shape in tensors.values())
    assert opened.resident == size - 2 * 60 * expert


def test_values_that_steer_the_routers_are_filled_in(memory_accuracy: object, tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": ("U32", (64, 8)),
        "model.embed_tokens.scales": ("BF16", (64, 1)),
        "model.norm.weight": ("BF16", (64,)),
        "model.layers.0.mlp.gate.weight": ("U32", (60, 8)),
        "lm_head.weight": ("U32", (64, 8)),
    }
    path = tmp_path / "model.safetensors"
    write_sparse(path, tensors)
    size = path.stat().st_size
    memory_accuracy.fill(path, tensors)  # type: ignore[attr-defined]
    import mlx.core as mx

    found = mx.load(str(path))
    assert path.stat().st_size == size
    assert (found["model.norm.weight"] == 1).all() and (found["model.embed_tokens.scales"] == 1 / 32).all()
    assert found["model.embed_tokens.weight"].any() and found["model.layers.0.mlp.gate.weight"].any()
    assert not found["lm_head.weight"].any()


def test_the_table_marks_what_is_off(memory_accuracy: object) -> None:
    def measured(planned: int, peak: int, footprint: int | None = None) -> object:
        parts = {"overhead": 10}
        return memory_accuracy.Measured(100, 8, 4, 4, 8, parts, planned + 10, peak, footprint)  # type: ignore[attr-defined]

    rows = [measured(100, 98), measured(100, 90), measured(100, 101), measured(100, 98, 99), measured(100, 98, 101)]
    lines = memory_accuracy.table(rows)  # type: ignore[attr-defined]
    assert [("beyond 5 %" in x, "ABOVE" in x) for x in lines[1:]] == [
        (False, False),
        (True, False),
        (False, True),
        (False, False),
        (False, True),
    ]


def test_a_plan_for_the_demo_model_is_within_5_percent(memory_accuracy: object) -> None:
    made = memory_accuracy.settings(demo_model(), 8, 4)  # type: ignore[attr-defined]
    assert [s.budget for s in made] == sorted({s.budget for s in made}) and len(made) == 4
    found = memory_accuracy.in_fresh_process(demo_model(), made[1])  # type: ignore[attr-defined]
    assert found.slots == 4 + 15 and found.peak <= found.budget
    assert abs(found.ratio - 1) <= memory_accuracy.TARGET  # type: ignore[attr-defined]


@pytest.mark.parametrize("only", [True, False])
def test_the_last_line_is_the_record(
    memory_accuracy: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], only: bool
) -> None:
    def measured(folder: Path, s: Any) -> object:
        parts = {"overhead": 10}
        return memory_accuracy.Measured(s.budget, s.prompt, s.reply, 4, 8, parts, 110, 98, None)  # type: ignore[attr-defined]

    monkeypatch.setattr(memory_accuracy, "in_fresh_process", measured)
    memory_accuracy.main(["--prompt", "8", "--reply", "4", *(["--json"] if only else [])])  # type: ignore[attr-defined]
    *lines, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert record["benchmark"] == "memory_accuracy" and [r["prompt"] for r in record["results"]] == [8] * 4
    assert (lines == []) == only and (only or lines[-1] == "budget kept in all")


def test_a_run_that_fails_is_explained(memory_accuracy: object) -> None:
    setting = memory_accuracy.Setting(1000, 8, 4)  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"budget of 1.00 KB failed: .*the smallest that works is"):
        memory_accuracy.in_fresh_process(demo_model(), setting)  # type: ignore[attr-defined]
