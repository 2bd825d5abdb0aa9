"""The speed benchmark in tiny settings: what it replays, what it counts, and its arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_moecache.errors import UsageError
from mlx_moecache.stats import PhaseStats

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import speed_calibrate
import speed_checkpoints
import speed_compare
import speed_limits
import speed_page
import speed_replay
import speed_report
import speed_setup
import speed_suites
import speed_targets
import speed_waits
from speed_rounds import START, Prefill, Round, Segment, measure_decode, measure_prefill, segment

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
    assert [speed_setup.parse_configuration(f"hostread={x}").host_read for x in ("2ms", "500us", "0")] == [
        2e-3,
        5e-4,
        0,
    ]
    assert c.flash == speed_setup.Flash(None, 4.0, pytest.approx(1e-4))
    assert speed_setup.parse_flash("500MB/s") == speed_setup.Flash(5e8)
    assert [speed_setup.slot_count(s, 60) for s in ("30", "50%", "all", "all-1", "99")] == [30, 30, 60, 59, 60]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slots", "'slots' in 'slots' is no setting"),
        ("slots=half", "'half' is no number of slots"),
        ("flash=fast", "'fast' is no flash"),
        ("slots=8 overlap=off", "no option 'overlap'; there are slots, routing, flash, hostread, span,"),
        ("slots=8 hostread=2", "'2' is no time; write 2ms"),
        ("slots=8 lookahead=maybe", "lookahead takes on or off"),
        ("slots=all lookahead=on", "this model has no look-ahead"),
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


def test_look_ahead_is_switched_where_the_model_has_it(folder: Path, recording: speed_replay.Recording) -> None:
    x = side("slots=8 lookahead=off", folder, recording)
    assert x.cache is not None
    x.cache.look_ahead = SimpleNamespace(enabled=False)  # type: ignore[assignment]
    for value in ("on", "off"):
        speed_setup.set_attribute(x.cache, "lookahead", value)
        assert x.cache.look_ahead is not None and x.cache.look_ahead.enabled == (value == "on")
    x.close()


@pytest.mark.parametrize("span", ["1", "3"])
def test_longer_host_reads_are_waited_for_once_a_look_and_change_nothing_else(
    folder: Path, recording: speed_replay.Recording, span: str
) -> None:
    slow = side(f"slots=12 span={span} hostread=3ms", folder, recording)
    plain = side(f"slots=12 span={span}", folder, recording)
    for x in (slow, plain):
        x.begin(START, tokens=12)
        x.advance(2)
    waited = slow.waited
    found = segment(slow, 10)
    assert slow.cache is not None and plain.cache is not None
    looks = found.stats.host_reads
    assert 0 < looks == segment(plain, 10).stats.host_reads <= 30
    assert slow.waited - waited >= 3e-3 * looks and sum(found.waits) >= 3e-3 * looks
    assert found.seconds >= 3e-3 * looks and found.calls
    slow.close()
    plain.close()


def test_the_chooser_of_the_span_knows_of_longer_host_reads(folder: Path, recording: speed_replay.Recording) -> None:
    slow = side("slots=12 hostread=20ms", folder, recording)
    assert slow.cache is not None and slow.cache.optimist is not None
    assert slow.cache.optimist.chooser.host_read > 20e-3
    slow.close()


def test_warming_does_not_wait_for_a_slow_flash_and_what_follows_does(
    folder: Path, recording: speed_replay.Recording
) -> None:
    x = side("slots=8 flash=0.5MB/s", folder, recording)
    assert x.cache is not None
    x.warm()
    assert x.cache.reader.bytes_read == 3 * 8 * x.cache.layers[0].bytes_per_expert
    assert x.cache.reader.read_seconds < 0.5 < x.cache.reader.bytes_read / 0.5e6
    before = x.cache.reader.bytes_read
    x.begin(START, tokens=2)
    x.advance(1)
    assert x.cache.reader.read_seconds >= 0.9 * (x.cache.reader.bytes_read - before) / 0.5e6 > 0
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
    assert len(s.waits) == len(s.calls) and all(w > 0 for w, (_, b) in zip(s.waits, s.calls, strict=True) if b)
    assert sum(s.waits) == pytest.approx(s.stats.wait_seconds, rel=0.5)
    assert all(len(r.reads["slots=8"]) == 4 and min(r.reads["slots=8"]) > 0 and r.raw > 0 for r in rounds)
    prompts = measure_prefill(sides, rounds=2, prompt=20, at=300, show=False)
    assert all(p.seconds > 0 and p.tokens == 20 for r in prompts for p in r.values())
    assert prompts[0]["slots=8"].stats.selections == 3 * 20 * 4
    for x in sides:
        x.close()


def test_the_idle_control_waits_as_told_and_counts_what_is_left(
    folder: Path, recording: speed_replay.Recording
) -> None:
    x = side("slots=all", folder, recording)
    control = speed_waits.IdleControl(x)
    control.begin(["a", "b"], START, warm_up=1, tokens=4)
    x.begin(START, tokens=20)
    x.advance(1)
    began = time.perf_counter()
    left = control._seconds("a", 2, [0.02] * 6)
    seconds = time.perf_counter() - began
    assert control._slept >= 0.12 and left == pytest.approx((seconds - control._slept) / 2, abs=20e-3)
    found = control.excess({"a": made(1.0, waits=(0.0, 0.01, 0.0)), "b": made(1.0), "c": made(1.0, waits=(1.0,))})
    assert list(found) == ["a"] and abs(found["a"]) < 0.5
    control._slept = 0.0
    x.advance(3)  # whoever else times the side does not wait
    assert control._slept == 0
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


def test_flash_times_the_compute_of_a_prompt(
    folder: Path, recording: speed_replay.Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = PhaseStats(wait_seconds=1.0, bytes_read=800)
    monkeypatch.setattr(
        speed_calibrate,
        "measure_prefill",
        lambda sides, *, prompt, **_: [{sides[0].name: Prefill(3.0, prompt, stats, None)}],
    )
    wanted = [speed_setup.parse_configuration("slots=8 flash=4x")]
    (found,) = speed_calibrate.resolve(wanted, folder, recording, tokens=0, prompt=20, replayed=True)
    assert found.flash is not None and found.flash.bytes_per_second == 800 / (4 * 2.0)


# ---- limits ----


def made(
    seconds: float,
    *,
    waited: float = 0.0,
    looks: int = 0,
    calls: tuple[tuple[int, int], ...] = (),
    waits: tuple[float, ...] = (),
) -> Segment:
    stats = PhaseStats(host_reads=looks, wait_seconds=waited, bytes_read=1000 * sum(b for _, b in calls))
    stats.read_seconds = 1.0 if calls else 0.0
    return Segment(seconds, 1, stats, None, calls, waits)


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
    assert found.idle is None and found.over_with_idle is None
    longer = speed_limits.limit(rounds, "x", parts, host_read=0.25)
    assert longer.host == 1.5 and longer.limit == found.limit + 0.5


def test_what_idle_waits_cost_is_added_to_the_limit_unless_it_may_be_noise() -> None:
    decode = {"x": made(18.0, waited=3.0, looks=2, calls=((3, 1), (2, 2)))}
    parts = speed_limits.Parts(dense=10.0, experts=4.0, host_read=0.5, layers=2, k=4)

    def over(*excess: float) -> speed_limits.Limit:
        rounds = [Round(decode, 1.0, {"x": (1.0, 3.0, 5.0, 7.0)}, {"x": i}) for i in excess]
        return speed_limits.limit(rounds, "x", parts)

    sure, noise = over(0.4, 0.5, 0.6), over(-0.3, 0.5, 0.6)
    assert sure.idle == 0.5 and sure.over_with_idle is not None
    assert sure.over_with_idle.value == pytest.approx(17 / (14.5 + 0.5))
    assert sure.over == noise.over and noise.idle == 0 and noise.over_with_idle == noise.over


def test_a_host_read_that_may_be_noise_excuses_nothing() -> None:
    def a_round(looking: float) -> Round:
        texts = (speed_limits.RESIDENT.text, speed_limits.DENSE_ONLY.text, speed_limits.LOOKING.text)
        segments = (made(14.0), made(10.0), made(looking, looks=2))
        return Round(dict(zip(texts, segments, strict=True)), 1.0, {})

    assert speed_limits.parts([a_round(x) for x in (15.0, 15.2, 15.4)], layers=2, k=4).host_read == pytest.approx(0.6)
    assert speed_limits.parts([a_round(x) for x in (12.0, 15.2, 19.0)], layers=2, k=4).host_read == 0


def test_figures_say_what_fewer_bytes_allow() -> None:
    slow, fast = made(8.0, waited=6.0, calls=((0, 4),)), made(4.0, waited=2.0, calls=((3, 1),))
    rounds = [Round({"a": slow, "b": fast}, 2000.0, {})] * 2
    a, b = speed_report.decode_figures(rounds, [speed_setup.Configuration(x) for x in "ab"], None)
    assert b.ratio.value == 2 and a.allowed_ratio == 1
    assert b.allowed_ratio == pytest.approx(8 / (2 + 6 / 4))
    assert a.compute_seconds == 2 and a.hidden == -5 and a.raw_share is not None and a.raw_share.value == 2
    assert (b.misses_per_layer, b.all_hit_share) == (1, 0)
    assert speed_report.coldness([(900, 1000), (None, 500)]) == 0.9


def test_prefill_is_held_against_the_first_and_against_the_flash() -> None:
    def prompt(seconds: float, nbytes: int) -> Prefill:
        return Prefill(seconds, 100, PhaseStats(bytes_read=nbytes, read_seconds=1.0), None)

    rounds = [{"slots=all": prompt(2.0, 0), "half": prompt(10.0, 900)}] * 2
    half = speed_setup.Configuration("half", flash=speed_setup.Flash(100.0))
    found = speed_report.prefill_figures(rounds, [speed_setup.Configuration("slots=all"), half])
    assert found[0].flash_share is None and found[1].flash_share is not None
    assert found[1].flash_share.value == 0.9 and found[1].ratio.value == 0.2 and found[1].reads_over_first == 4.5


# ---- targets ----


def verdicts(
    texts: Sequence[str],
    seconds: Sequence[float],
    *,
    suite: str | None = None,
    spread: float = 0.0,
    count: int = 6,
    read_ahead: int = 1,
) -> list[speed_targets.Verdict]:
    """Of configurations whose tokens take so long, give or take `spread`, in a record of `count` rounds.

    All but `all` and `stock` read.
    """
    configurations = []
    for text in texts:
        c = speed_setup.parse_configuration(text)
        configurations.append(replace(c, flash=speed_setup.Flash(1e6)) if c.flash is not None else c)
    partly = {c.text for c in configurations if c.slots != "all" and c.routing != "stock"}
    rounds = []
    for sign in (-1, 0, 1):
        decode = {
            c.text: made(t * (1 + sign * spread), waited=t / 2, looks=2, calls=((3, int(4 * t)),))
            if c.text in partly
            else made(t * (1 + sign * spread * (i > 0)))
            for i, (c, t) in enumerate(zip(configurations, seconds, strict=True))
        }
        for s in decode.values():
            s.stats.read_ahead = read_ahead
        rounds.append(Round(decode, 1.0, {}))
    found = speed_compare.Comparison(
        1,
        60,
        4,
        10**9,
        configurations,
        [1.0] * 3,
        None,
        speed_report.decode_figures(rounds, configurations, None),
        [],
        {},
    )
    record = json.loads(json.dumps({"suite": suite, "rounds": count, "prompts": 0, "comparisons": [asdict(found)]}))
    return list(speed_targets.verdicts(record))


@pytest.mark.parametrize(
    ("seconds", "spread", "expected"),
    [(1.01, 0.0, speed_targets.MET), (1.05, 0.0, speed_targets.MISSED), (1.05, 0.3, speed_targets.NOISY)],
)
def test_resident_models_are_held_against_stock(seconds: float, spread: float, expected: str) -> None:
    (found,) = verdicts(["routing=stock", "slots=all"], [1.0, seconds], spread=spread)
    assert "stock" in found.what and (found.target, found.verdict) == (">= 0.98", expected)


def test_a_bias_is_held_against_what_its_bytes_allow() -> None:
    (found,) = verdicts(["slots=50% flash=4x", "slots=50% flash=4x routing=cache-prior"], [4.0, 2.0])
    # Of 4 s the half is waiting, of which half the bytes allow half: 3 s, x 1.333.
    assert "x 2.000" in found.note and "x 1.333" in found.note and "perplexity not measured" in found.note
    assert found.measured.startswith("1.500") and found.verdict == speed_targets.MET


@pytest.mark.parametrize(
    ("texts", "name"),
    [
        (["slots=50% hostread=2ms span=1", "slots=50% hostread=2ms"], "span"),
        (["slots=50% flash=4x lookahead=off", "slots=50% flash=4x lookahead=on"], "lookahead"),
        (["slots=50% flash=4x overlaps=off", "slots=50% flash=4x"], "overlaps"),
    ],
)
def test_an_option_is_kept_only_if_it_wins(texts: list[str], name: str) -> None:
    for seconds, spread, expected in ((1.8, 0.0, "met"), (2.2, 0.0, "**not met**"), (2.0, 0.0, "too noisy to tell")):
        (found,) = [v for v in verdicts(texts, [2.0, seconds], spread=spread) if "on / off" in v.what]
        assert found.what.startswith(name) and found.verdict == expected


def test_an_option_that_the_engine_did_not_use_and_few_rounds_decide_nothing() -> None:
    texts = ["slots=50% flash=4x lookahead=off", "slots=50% flash=4x lookahead=on"]
    verdict = [verdicts(texts, [2.0, 1.0], **x)[0].verdict for x in ({"read_ahead": 0}, {"count": 5})]
    assert verdict == [speed_targets.UNUSED, speed_targets.FEW]


def test_a_strategy_may_not_look_more_often() -> None:
    texts = ["slots=50% routing=original", "slots=50% routing=cache-prior"]
    (found,) = [v for v in verdicts(texts, [1.0, 1.0], suite="strategies") if "host reads" in v.what]
    assert found.verdict == speed_targets.MET


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
    (found,) = record["comparisons"]
    assert [d["name"] for d in found["decode"]] == ["slots=50%", "slots=50% overlaps=off"]
    assert found["decode"][0]["host_reads"] == 6 and found["parts"]["layers"] == 6
    assert found["decode"][0]["limit"]["over_with_idle"] is not None
    assert found["prefill"][0]["tokens"] == 12
    path = tmp_path / "record.json"
    path.write_text(done.stdout)
    text = "\n".join(speed_page.page([speed_page.load(path)]))
    assert "| `slots=50% overlaps=off` |" in text and "| `slots=50%`: token / its limit |" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert "over the limit with idle waits" in text and len({line.count("|") for line in tables[:4]}) == 1


def test_the_command_explains_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "speed.py"), "--folder", str(tmp_path), "slots=some"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: 'some' is no number of slots") and len(done.stderr.splitlines()) == 1


def test_every_suite_can_be_parsed_and_compares_what_differs() -> None:
    for suite in speed_suites.SUITES.values():
        for texts in suite.comparisons:
            assert [speed_setup.parse_configuration(t).text for t in texts] == list(texts)
            assert len(set(texts)) == len(texts) > 1


def test_prompts_alone_are_timed_where_a_suite_says_so(folder: Path, recording: speed_replay.Recording) -> None:
    settings = speed_compare.Settings(1, 1, 1, prompt=20, prompts=2, decodes=False, limits=True, show=False)
    configurations = [speed_setup.parse_configuration(x) for x in ("slots=all", "slots=8 flash=2x")]
    found = speed_compare.compare(configurations, settings, folder, recording, replayed=True)
    assert found.decode == [] and found.parts is None and found.prefill[0].name == "slots=all"
    half = found.prefill[1]
    assert half.flash_share is not None and 0 < half.flash_share.value <= 1 and half.bytes_read > 0
    record = json.loads(json.dumps({"suite": "prefill", "rounds": 0, "prompts": 2, "comparisons": [asdict(found)]}))
    (verdict,) = speed_targets.verdicts(record)
    assert "prefill of 20 tokens" in verdict.what and verdict.verdict == speed_targets.FEW


def test_the_page_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"benchmark": "decode_speed"}')
    with pytest.raises(UsageError, match="something else"):
        speed_page.load(path)
