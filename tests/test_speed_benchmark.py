"""The speed benchmark in tiny settings: what it replays, what it counts, and its arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_moecache.errors import UsageError
from mlx_moecache.stats import PhaseStats

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import speed
import speed_calibrate
import speed_checkpoints
import speed_limits
import speed_page
import speed_replay
import speed_report
import speed_setup
from speed_rounds import START, Round, Segment, measure_decode, measure_prefill, segment

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = {
    "qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 16},
    "olmoe": {"intermediate_size": 64, "num_experts": 64, "num_experts_per_tok": 8},
    "qwen3_moe": {"moe_intermediate_size": 64, "num_experts": 128, "head_dim": 64},
}
REAL = {"qwen2_moe": speed_checkpoints.QWEN, "olmoe": speed_checkpoints.OLMOE, "qwen3_moe": speed_checkpoints.QWEN3}


def tiny(kind: str, layers: int = 3) -> dict[str, Any]:
    heads = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 512}
    return {**REAL[kind], **heads, **TINY[kind], "num_hidden_layers": layers, "eos_token_id": 511}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speed_checkpoints.made_once(tmp_path_factory.mktemp("speed") / "tiny", tiny("qwen2_moe"), "F32")


@pytest.fixture(scope="module")
def recording() -> speed_replay.Recording:
    """400 tokens with recognisable scores, which change slowly, as real routing does."""
    rng = np.random.default_rng(0)
    z = (rng.normal(size=(6, 400, 60)).cumsum(axis=1) + rng.normal(0, 8, (6, 400, 60))).astype(np.float32)
    return speed_replay.Recording("made up", rng.integers(0, 500, 400).astype(np.int32), z, z[:, ::-1].copy())


def side(text: str, folder: Path, recording: speed_replay.Recording) -> speed_setup.Side:
    return speed_setup.Side(speed_setup.parse_configuration(text), folder, recording, context=128, replayed=True)


# ---- checkpoints ----


@pytest.mark.parametrize("kind", TINY)
def test_a_synthetic_checkpoint_loads_and_its_outputs_are_finite(kind: str, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    model, _ = load_model(speed_checkpoints.made_once(tmp_path / kind, tiny(kind), "F32"))
    logits = model(mx.array([[1, 2, 3]]))
    assert mx.isfinite(logits).all() and float(mx.std(logits)) > 0.01


def test_a_checkpoint_is_made_once_and_leaves_no_rest(tmp_path: Path) -> None:
    made = speed_checkpoints.made_once(tmp_path / "tiny", tiny("qwen2_moe", 1), "F32")
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert speed_checkpoints.made_once(tmp_path / "tiny", tiny("qwen2_moe", 1), "F32") == made
    assert (made / "model.safetensors").stat().st_mtime_ns == before
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_expert_bytes_are_on_disk_and_not_a_hole(folder: Path) -> None:
    stat = (folder / "model.safetensors").stat()
    assert stat.st_blocks * 512 >= 0.95 * stat.st_size


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_checkpoints, "MOST_OF_DISK", 0.0)
    with pytest.raises(UsageError, match="fewer --layers"):
        speed_checkpoints.made_once(tmp_path / "tiny", tiny("qwen2_moe", 1), "F32")
    assert list(tmp_path.iterdir()) == []


def test_families_keep_real_shapes_and_shrink_layers_and_vocabulary() -> None:
    family = speed_checkpoints.FAMILIES["qwen1.5-moe"]
    config = speed_checkpoints.reduced(family, 3)
    assert config["vocab_size"] == 18944 and config["num_hidden_layers"] == 3
    tensors = speed_checkpoints.tensors_of(config, 3)
    assert tensors["model.layers.2.mlp.switch_mlp.gate_proj.weight"] == ("U32", (60, 1408, 256))


# ---- replayed routing ----


def test_layers_and_positions_are_mapped_as_documented(recording: speed_replay.Recording) -> None:
    z = recording.z
    assert (speed_replay.mapped(z, 2, 60, 4) == z[2]).all()
    further = speed_replay.mapped(z, 8, 60, 4)  # demo layer 2, 509 tokens on
    assert (further[0] == z[2, speed_replay.SHIFT % 400]).all()
    assert (speed_replay.mapped(z, 1, 16, 4) == z[1, :, :16]).all()


def test_additional_experts_are_never_chosen_and_leave_the_range_as_it_was(recording: speed_replay.Recording) -> None:
    z = speed_replay.mapped(recording.z, 0, 64, 8)
    best = np.argsort(z, axis=-1)[:, -8:]
    assert z.shape == (400, 64) and best.max() < 60
    assert np.allclose(np.ptp(z, axis=-1), np.ptp(recording.z[0], axis=-1))
    assert (np.sort(best) == np.sort(np.argsort(recording.z[0], axis=-1)[:, -8:])).all()


def test_more_experts_come_from_several_demo_layers_in_equal_shares(recording: speed_replay.Recording) -> None:
    z = speed_replay.mapped(recording.z, 5, 128, 8)
    best = np.argsort(z, axis=-1)[:, -8:]
    assert ((best < 64).sum(axis=-1) == 4).all()
    assert (np.sort(best[best < 64].reshape(400, 4)) == np.sort(np.argsort(recording.z[5], axis=-1)[:, -4:])).all()
    second = np.sort(best[best >= 64].reshape(400, 4) - 64)
    shifted = np.roll(recording.z[0], -speed_replay.SHIFT, axis=0)
    assert (second == np.sort(np.argsort(shifted, axis=-1)[:, -4:])).all()


@pytest.mark.parametrize("span", ["1", "3"])
def test_every_token_of_a_reply_is_routed_by_the_recording(
    folder: Path, recording: speed_replay.Recording, span: str
) -> None:
    x = side(f"slots=50% span={span}", folder, recording)
    x.begin(START, tokens=9)
    used: list[tuple[int, list[int]]] = []

    class Listener:
        def used(self, layer: int, phase: str, experts: list[int], missed: list[int]) -> None:
            if phase == "decode":
                used.append((layer, sorted(experts)))

    x.advance(1)
    assert x.cache is not None
    x.cache.listener = Listener()
    x.advance(8)
    for layer in range(3):
        z = recording.z[layer, speed_setup.WARM + START :, :16][:8]
        expected = [sorted(row) for row in np.argsort(z, axis=-1)[:, -4:].tolist()]
        assert [e for n, e in used if n == layer] == expected
    x.close()


def test_looking_ahead_finds_a_prediction_and_not_the_truth(folder: Path, recording: speed_replay.Recording) -> None:
    x = side("slots=all", folder, recording)
    assert x.clock is not None
    x.clock.position = 5
    gate, hidden = x.model.layers[1].mlp.gate, mx.zeros((1, 1, 128))
    x.clock.layer = 0
    assert np.allclose(np.array(gate(hidden)).ravel(), recording.ahead[1, 5, :16], atol=1e-4)
    x.clock.layer = 1
    assert np.allclose(np.array(gate(hidden)).ravel(), recording.z[1, 5, :16], atol=1e-4)
    x.close()


def test_stock_and_ours_are_routed_alike(folder: Path, recording: speed_replay.Recording) -> None:
    ids = mx.array([[1, 2, 3, 4, 5]])
    stock, ours = side("routing=stock", folder, recording), side("slots=4", folder, recording)
    assert mx.array_equal(stock.model(ids), ours.model(ids))
    ours.close()


def test_the_cache_is_warmed_with_what_lru_would_hold(folder: Path, recording: speed_replay.Recording) -> None:
    x = side("slots=8", folder, recording)
    x.warm()
    assert x.cache is not None
    for i, layer in enumerate(x.cache.layers):
        order: list[int] = []
        for row in np.argsort(recording.z[i, : speed_setup.WARM, :16], axis=-1)[:, ::-1][:, :4]:
            for e in row.tolist():
                order = [o for o in order if o != e] + [e]
        assert layer.residents.eviction_order() == order[-8:]
    x.close()


# ---- configurations ----


def test_a_configuration_is_read_from_text() -> None:
    c = speed_setup.parse_configuration("slots=30  routing=cache-prior:strength=0.1,j=1 flash=4x+100us overlaps=off")
    assert c.text == "slots=30 routing=cache-prior:strength=0.1,j=1 flash=4x+100us overlaps=off"
    assert (c.slots, c.routing, c.engine) == ("30", "cache-prior:strength=0.1,j=1", (("overlaps", "off"),))
    assert c.flash == speed_setup.Flash(None, 4.0, pytest.approx(1e-4))
    assert speed_setup.parse_flash("500MB/s") == speed_setup.Flash(5e8)
    assert [speed_setup.slot_count(s, 60) for s in ("30", "50%", "all", "all-1", "99")] == [30, 30, 60, 59, 60]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slots", "'slots' in 'slots' is no setting"),
        ("slots=half", "'half' is no number of slots"),
        ("flash=fast", "'fast' is no flash"),
        ("slots=8 overlap=off", "no option 'overlap'; there are slots, routing, flash, span,"),
        ("slots=8 overlaps=maybe", "overlaps takes on or off, not 'maybe'"),
        ("slots=8 threads=many", "threads takes a number, not 'many'"),
        ("slots=8 routing=lucky", "unknown routing 'lucky'"),
    ],
)
def test_a_wrong_configuration_is_explained(
    text: str, message: str, folder: Path, recording: speed_replay.Recording
) -> None:
    with pytest.raises(UsageError, match=message.replace("'", ".")):
        side(text, folder, recording)


def test_engine_options_reach_the_engine(folder: Path, recording: speed_replay.Recording) -> None:
    x = side("slots=8 overlaps=off eviction=lfu threads=2 direct_io=off", folder, recording)
    assert x.cache is not None and x.cache.overlaps is False
    assert x.cache.layers[0].residents.eviction == "lfu" and x.cache.reader.io_mode == "buffered"
    x.close()


# ---- measuring ----


def test_sides_are_timed_on_the_same_tokens_and_their_counters_kept(
    folder: Path, recording: speed_replay.Recording
) -> None:
    sides = [
        side(text, folder, recording) for text in ("slots=8", "slots=8 overlaps=off", "slots=all", "routing=stock")
    ]
    shard = folder / "model.safetensors"
    rounds = measure_decode(sides, rounds=2, tokens=3, warm_up=2, shard=shard, show=False)
    assert [set(r.decode) for r in rounds] == [{s.name for s in sides}] * 2
    one, other, whole, stock = (PhaseStats() if s.cache is None else s.cache.stats.decode for s in sides)
    assert one.misses == other.misses > 0 and one.bytes_read == other.bytes_read
    assert whole.host_reads == stock.host_reads == 0
    s = rounds[0].decode["slots=8"]
    assert s.tokens == 6 and len(s.calls) == 6 * 3 and {a + b for a, b in s.calls} == {4}
    assert sum(b for _, b in s.calls) == s.stats.misses
    assert all(len(r.reads["slots=8"]) == 4 and min(r.reads["slots=8"]) > 0 and r.raw > 0 for r in rounds)
    prompts = measure_prefill(sides, rounds=2, prompt=20, at=300, show=False)
    assert all(p.seconds > 0 and p.tokens == 20 for r in prompts for p in r.values())
    assert prompts[0]["slots=8"].stats.selections == 3 * 20 * 4
    for x in sides:
        x.close()


def test_experts_that_compute_nothing_give_zeros(folder: Path, recording: speed_replay.Recording) -> None:
    x = side("slots=all routing=dense", folder, recording)
    out = x.model.layers[0].mlp.switch_mlp(mx.ones((1, 1, 128)), mx.array([[[1, 2, 3, 4]]], dtype=mx.uint32))
    assert out.shape == (1, 1, 4, 128) and not out.any()
    x.close()


def test_flash_times_compute_becomes_a_speed(
    folder: Path, recording: speed_replay.Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        speed_calibrate,
        "segment",
        lambda x, n: replace(segment(x, n), seconds=3.0 * n, stats=PhaseStats(wait_seconds=n)),
    )
    wanted = [speed_setup.parse_configuration(f"slots=8 flash={n}x") for n in (1, 4)]
    one, four = speed_calibrate.resolve(wanted, folder, recording, tokens=40, replayed=True)
    assert one.flash is not None and four.flash is not None
    x = side("slots=8", folder, recording)
    x.warm()
    x.begin(START, tokens=41)
    x.advance(41)
    assert x.cache is not None
    nbytes = x.cache.stats.decode.bytes_read / 40
    x.close()
    # 2 s of compute per token; what is read while the prompt is processed changes the cache a little.
    assert one.flash.bytes_per_second == pytest.approx(nbytes / 2, rel=0.2)
    assert four.flash.bytes_per_second == pytest.approx(one.flash.bytes_per_second / 4)


# ---- limits ----


def made(seconds: float, *, waited: float = 0.0, looks: int = 0, calls: tuple[tuple[int, int], ...] = ()) -> Segment:
    stats = PhaseStats(host_reads=looks, wait_seconds=waited, bytes_read=1000 * sum(b for _, b in calls))
    stats.read_seconds = 1.0 if calls else 0.0
    return Segment(seconds, 1, stats, None, calls)


def test_the_limit_follows_from_parts() -> None:
    # Two layers, four experts each: 4 s of experts, 10 s of everything else, 0.5 s for a host read.
    calls = ((3, 1), (2, 2))
    decode = {
        speed_limits.RESIDENT.text: made(14.0),
        speed_limits.DENSE_ONLY.text: made(10.0),
        speed_limits.LOOKING.text: made(15.5, waited=0.5, looks=2),
        "x": made(18.0, waited=3.0, looks=2, calls=calls),
    }
    rounds = [Round(decode, 1.0, {"x": (1.0, 3.0, 5.0, 7.0)})] * 3
    parts = speed_limits.parts(rounds, layers=2, k=4)
    assert (parts.dense, parts.experts, parts.host_read) == (10.0, 4.0, 0.5)
    found = speed_limits.limit(rounds, "x", parts)
    # Layer 0: three hits take 1.5 s, one read 1 s. Layer 1: two hits 1 s, two reads 3 s. Host reads 1 s.
    assert found.limit == 10 + 1.5 + 3 + 1
    assert found.with_late_experts == found.limit + 0.5 + 1
    assert found.in_turn == 10 + (1.5 + 1 + 0.5) + (1 + 3 + 1) + 1
    assert found.over.value == pytest.approx((18 - 1) / (15.5 - 1))
    assert found.overlap is not None and found.overlap.value == pytest.approx((19 - 18) / (19 - 17))


def test_a_host_read_that_may_be_noise_excuses_nothing() -> None:
    def a_round(looking: float) -> Round:
        texts = (speed_limits.RESIDENT.text, speed_limits.DENSE_ONLY.text, speed_limits.LOOKING.text)
        segments = (made(14.0), made(10.0), made(looking, looks=2))
        return Round(dict(zip(texts, segments, strict=True)), 1.0, {})

    assert speed_limits.parts([a_round(x) for x in (15.0, 15.2, 15.4)], layers=2, k=4).host_read == pytest.approx(0.6)
    assert speed_limits.parts([a_round(x) for x in (12.0, 15.2, 19.0)], layers=2, k=4).host_read == 0


def test_verdicts_need_an_interval_that_can_tell() -> None:
    def over(low: float, value: float, high: float) -> dict[str, Any]:
        estimate = {"value": value, "low": low, "high": high}
        first = {"name": "a", "bytes_read": 0, "host_reads": 6.0, "limit": {"over": estimate}}
        return {"decode": [first], "suite": None, "perplexity": {}}

    verdicts = [next(speed_page._verdicts(over(*x))) for x in ((1.0, 1.05, 1.1), (1.2, 1.25, 1.3), (0.5, 1.0, 1.8))]
    assert [v.rpartition(": ")[2] for v in verdicts] == ["met", "**not met**", "too noisy to tell"]


def test_figures_say_what_fewer_bytes_allow() -> None:
    slow, fast = made(8.0, waited=6.0, calls=((0, 4),)), made(4.0, waited=2.0, calls=((3, 1),))
    rounds = [Round({"a": slow, "b": fast}, 2000.0, {})] * 2
    a, b = speed_report.decode_figures(rounds, ["a", "b"], None, set())
    assert b.ratio.value == 2 and a.allowed_ratio == 1
    assert b.allowed_ratio == pytest.approx(8 / (2 + 6 / 4))
    assert a.compute_seconds == 2 and a.hidden == -5 and a.raw_share is not None and a.raw_share.value == 2
    assert speed_report.coldness([(900, 1000), (None, 500)]) == 0.9


# ---- the command and the page ----


def test_the_command_prints_a_table_and_a_record_and_the_page_shows_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    keep = tmp_path / "cache"
    command = [
        sys.executable,
        str(BENCHMARKS / "speed.py"),
        "--folder",
        str(keep),
        "--checkpoint",
        "demo",
        "--rounds",
        "2",
    ]
    command += ["--tokens", "2", "--warm-up", "2", "--prompt", "12", "slots=50%", "slots=50% overlaps=off"]
    ids = rng.integers(1, 4000, 600).astype(np.int32)
    z = rng.normal(size=(6, 600, 60)).astype(np.float32)
    keep.mkdir()
    np.savez(keep / speed_replay.kept_name([]), ids=ids, z=z, ahead=z)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    record = json.loads(last)
    assert any(line.startswith("1. slots=50%") for line in lines) and "Traceback" not in done.stderr
    assert [d["name"] for d in record["decode"]] == ["slots=50%", "slots=50% overlaps=off"]
    assert record["decode"][0]["host_reads"] == 6 and record["parts"]["layers"] == 6
    assert record["prefill"][0]["tokens"] == 12
    path = tmp_path / "record.json"
    path.write_text(done.stdout)
    text = "\n".join(speed_page.page([speed_page.load(path)]))
    assert "| `slots=50% overlaps=off` |" in text and "within 1.1 of the limit" in text


def test_the_command_explains_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "speed.py"), "--folder", str(tmp_path), "slots=some"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: 'some' is no number of slots") and len(done.stderr.splitlines()) == 1


def test_every_suite_can_be_parsed() -> None:
    for texts in speed.SUITES.values():
        assert [speed_setup.parse_configuration(t).text for t in texts] == list(texts)


def test_the_page_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"benchmark": "decode_speed"}')
    with pytest.raises(UsageError, match="something else"):
        speed_page.load(path)
