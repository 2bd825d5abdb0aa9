"""Traces: what is recorded comes back, whatever the interruption; anything else is refused with what to do."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_traces import E, K, header, scores, top

from mlx_moecache.demo import DEMO_MODEL
from mlx_moecache.errors import UsageError
from mlx_moecache.observer import RoutedCall
from mlx_moecache.routing import CachePrior
from mlx_moecache.study.simulator import replay_strategy, starts_of
from mlx_moecache.study.trace import Trace, TraceWriter, read_trace
from mlx_moecache.study.trace_format import TracedLayer, TraceHeader, softmax


def write_calls(path: Path, calls: list[tuple[int, str, int]], *, head: TraceHeader | None = None) -> None:
    """Record calls (layer, phase, rows) of original routing, selections in no particular order."""
    with TraceWriter(path, head or header()) as writer:
        for i, (layer, phase, rows) in enumerate(calls):
            z = scores(rows, i)
            own = top(z)
            writer.record(layer, phase, z, own[:, ::-1], own[:, [1, 0, 2]])


def same(a: Trace, b: Trace) -> bool:
    return all(
        np.array_equal(getattr(x, name), getattr(y, name))
        for x, y in zip(a.layers, b.layers, strict=True)
        for name in ("own", "used", "calls", "decode")
    )


calls = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from(["prefill", "decode"]), st.integers(1, 5)), min_size=1, max_size=12
)


class TestWhatWasRecorded:
    @given(calls)
    def test_comes_back_by_layer_best_score_first(
        self, tmp_path_factory: pytest.TempPathFactory, recorded: list[tuple[int, str, int]]
    ) -> None:
        path = tmp_path_factory.mktemp("trace") / "a.trace"
        write_calls(path, recorded)
        trace = read_trace(path)
        assert trace.header == header() and trace.note is None and trace.is_original
        assert [x.number for x in trace.layers] == sorted({layer for layer, _, _ in recorded})
        for x in trace.layers:
            here = [(i, phase, rows) for i, (layer, phase, rows) in enumerate(recorded) if layer == x.number]
            z = np.concatenate([scores(rows, i) for i, _, rows in here])
            assert np.array_equal(x.own, top(z)) and np.array_equal(x.used, top(z))
            assert x.calls.tolist() == [0, *np.cumsum([rows for _, _, rows in here]).tolist()]
            assert x.decode.tolist() == [phase == "decode" for _, phase, _ in here]
            assert x.sequences == ((0, True),)
            recorded_z, p = x.scores()
            assert recorded_z.dtype == np.float32 and np.array_equal(recorded_z, z)
            assert np.array_equal(p, softmax(z))

    def test_steps_are_calls_of_their_own(self, tmp_path: Path) -> None:
        z = scores(4, 0)
        with TraceWriter(tmp_path / "t", header(1)) as writer:
            writer.record(0, "decode", z, top(z), top(z), steps=True)
        (layer,) = read_trace(tmp_path / "t").layers
        assert layer.calls.tolist() == [0, 1, 2, 3, 4] and layer.decode.all()

    def test_sequences_say_whether_their_caches_were_empty(self, tmp_path: Path) -> None:
        z = scores(1, 0)
        with TraceWriter(tmp_path / "t", header(2)) as writer:
            writer.begin_sequence()
            for cold in (False, True):
                for layer in (0, 1, 0, 1):
                    writer.record(layer, "decode", z, top(z), top(z))
                writer.begin_sequence(cold=cold)
            writer.begin_sequence(cold=False)  # the empty one before was cold, and so this is
            writer.record(0, "decode", z, top(z), top(z))
        trace = read_trace(tmp_path / "t")
        assert trace.layers[0].sequences == ((0, True), (2, False), (4, True))
        assert trace.layers[1].sequences == ((0, True), (2, False))  # which had no call after that

    def test_swapped_and_pruned_selections_are_told_from_the_routers_own(self, tmp_path: Path) -> None:
        z, pruned = scores(3, 0), scores(2, 1)
        swapped = top(z)
        swapped[1, 2] = top(z, K + 1)[1, K]
        with TraceWriter(tmp_path / "t", header(1)) as writer:
            writer.record(0, "decode", z, top(z), swapped)
            writer.record(0, "decode", pruned, top(pruned), top(pruned)[:, :2])
        trace = read_trace(tmp_path / "t")
        assert not trace.is_original
        assert np.array_equal(trace.layers[0].own, np.concatenate([top(z), top(pruned)]))
        assert np.array_equal(trace.layers[0].used[:3], swapped)
        assert trace.layers[0].used[3:].tolist() == [[*row[:2], -1] for row in top(pruned).tolist()]

    def test_an_observed_window_in_which_pruning_began_late_is_one_of_steps(self, tmp_path: Path) -> None:
        z = scores(3, 0)
        used = top(z)
        used[1:, 2] = -1  # as a window hands it over
        with TraceWriter(tmp_path / "t", header(1)) as writer:
            writer.observe(RoutedCall(0, "decode", z, softmax(z), top(z)[:, ::-1], used, True))
        (layer,) = read_trace(tmp_path / "t").layers
        assert np.array_equal(layer.used, used) and np.array_equal(layer.own, top(z))
        assert layer.calls.tolist() == [0, 1, 2, 3] and not layer.is_original

    def test_ruled_out_experts_and_probabilities_that_are_no_softmax_come_back(self, tmp_path: Path) -> None:
        z = scores(5, 0)
        z[:, 7] = -np.inf
        p = 1 / (1 + np.exp(-z))
        with TraceWriter(tmp_path / "t", header(1)) as writer:
            writer.record(0, "decode", z, top(z), top(z), p=softmax(z))
            without = (tmp_path / "t").stat().st_size
            writer.begin_sequence()
            first = (tmp_path / "t").stat().st_size - without
            writer.record(0, "decode", z, top(z), top(z), p=p)
        assert (tmp_path / "t").stat().st_size - without - first == 5 * (2 * 4 * E + 4 * K) + 14
        recorded_z, recorded_p = read_trace(tmp_path / "t").layers[0].scores()
        assert np.array_equal(recorded_z, np.concatenate([z, z]))
        assert np.array_equal(recorded_p[5:], p) and (recorded_p[:5, 7] == 0).all()

    @pytest.mark.parametrize("experts", [64, 65, 256])
    @pytest.mark.parametrize("constant", [0, 32])  # correction biases of published models
    def test_the_routers_own_experts_rank_first_also_where_scores_are_rounded(
        self, tmp_path: Path, experts: int, constant: int
    ) -> None:
        z = scores(200, 0, experts) + np.float32(constant)
        z[:, 1::2] = z[:, ::2][:, : experts // 2] + np.float32(1e-5)  # ties in float16
        with TraceWriter(tmp_path / "t", header(1, experts)) as writer:
            writer.record(0, "prefill", z, top(z), top(z))
        (layer,) = read_trace(tmp_path / "t").layers
        recorded, _ = layer.scores()
        assert np.array_equal(np.sort(top(recorded)), np.sort(top(z))) and np.array_equal(layer.own, top(z))
        assert np.array_equal(recorded, z) == (experts <= 64)
        distances = [x.max(axis=-1, keepdims=True) - x for x in (recorded, z)]  # a constant means nothing
        assert np.abs(distances[0] - distances[1]).max() < 4e-3
        assert (tmp_path / "t").stat().st_size < 200 * (experts * (4 if experts <= 64 else 2) + 4 * K) + 700

    def test_selections_of_a_router_that_cannot_be_observed_keep_their_order(self, tmp_path: Path) -> None:
        own = np.array([[4, 9, 2], [2, 3, 4]])
        with TraceWriter(tmp_path / "t", header(1)) as writer:
            writer.record(0, "decode", None, own, own)
        (layer,) = read_trace(tmp_path / "t").layers
        assert np.array_equal(layer.own, own)
        with pytest.raises(UsageError, match="layer 0 of this trace has no router scores"):
            layer.scores()

    def test_experts_that_compute_nothing_have_scores_and_numbers_too(self, tmp_path: Path) -> None:
        shape = TracedLayer(E, K, 100, 5, E + 2)
        z = scores(4, 0, E + 2)
        z[0, E] = 9
        head = TraceHeader("m", "longcat_flash", "", (shape,), "original", "lru")
        with TraceWriter(tmp_path / "t", head) as writer:
            writer.record(0, "decode", z, top(z), top(z), steps=True)
        (layer,) = read_trace(tmp_path / "t").layers
        assert layer.own[0, 0] == E and np.array_equal(layer.scores()[0], z)

    def test_what_does_not_fit_the_header_is_a_mistake_of_the_caller(self, tmp_path: Path) -> None:
        z = scores(2, 0)
        with TraceWriter(tmp_path / "t", header(1)) as writer:
            for args in ((z, top(z, 2), top(z)), (z[:, :8], top(z), top(z)), (z, top(z), top(z)[:1])):
                with pytest.raises(ValueError, match="layer 0 ranks 10 experts and has k=3"):
                    writer.record(0, "decode", *args)


class TestInterrupted:
    def test_at_any_byte_loses_only_the_last_call_and_says_so(self, tmp_path: Path) -> None:
        path, cut = tmp_path / "whole", tmp_path / "cut"
        write_calls(path, [(0, "decode", 1), (1, "decode", 1)])
        start = path.stat().st_size
        write_calls(path, [(0, "decode", 1), (1, "decode", 1)])
        whole = path.read_bytes()
        last = (len(whole) - start) // 2
        for size in range(start + last, len(whole)):
            cut.write_bytes(whole[:size])
            trace = read_trace(cut)
            assert [x.tokens for x in trace.layers] == [2, 1]
            dropped = size - start - last
            expected = f"left out the last {dropped:,} bytes of {cut}: they are not whole, as after an interruption"
            assert trace.note == (expected if dropped else None)

    @pytest.mark.parametrize("missing", [1, 5, 1000])
    def test_and_continued_is_as_if_the_last_call_had_not_begun(self, tmp_path: Path, missing: int) -> None:
        path = tmp_path / "t"
        write_calls(path, [(0, "decode", 1), (1, "prefill", 40)])
        path.write_bytes(path.read_bytes()[:-missing])
        write_calls(path, [(1, "decode", 2)])
        trace = read_trace(path)
        assert trace.note is None
        assert [x.calls.tolist() for x in trace.layers] == [[0, 1], [0, 2]]

    def test_a_damaged_byte_hides_what_follows(self, tmp_path: Path) -> None:
        path = tmp_path / "t"
        write_calls(path, [(0, "decode", 1)] * 3)
        data = bytearray(path.read_bytes())
        frame = 14 + 4 * E + 4 * K
        data[-frame - 20] ^= 1  # in the second of three
        path.write_bytes(data)
        trace = read_trace(path)
        assert trace.layers[0].tokens == 1 and trace.note is not None and f"last {2 * frame:,} bytes" in trace.note

    @pytest.mark.parametrize("damage", ["a byte", "the number of rows", "another trace"])
    def test_a_damaged_file_is_not_continued_as_what_follows_would_be_lost(self, tmp_path: Path, damage: str) -> None:
        path = tmp_path / "t"
        write_calls(path, [(0, "decode", 1)] * 3)
        data = bytearray(path.read_bytes())
        frame = 14 + 4 * E + 4 * K
        lost = len(data) if damage == "another trace" else 2 * frame
        if damage == "a byte":
            data[-frame - 20] ^= 1
        elif damage == "the number of rows":
            data[-2 * frame + 7] ^= 0x40
        else:
            data = data + data
        path.write_bytes(data)
        at = len(data) - lost
        note = read_trace(path).note
        assert note is not None and note.endswith(f"the file is damaged at byte {at:,}")
        with pytest.raises(UsageError, match=f"damaged at byte {at:,}; going on there would lose the {lost:,} bytes"):
            write_calls(path, [(0, "decode", 1)])
        assert path.read_bytes() == data

    def test_a_full_disk_is_said_to_be_that_of_the_trace(self, tmp_path: Path) -> None:
        if not Path("/dev/full").exists():
            pytest.skip("/dev/full is a Linux device")
        path = tmp_path / "t"
        path.symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left") as error, TraceWriter(path, header(1)):
            pass
        assert error.value.filename == str(path)

    def test_before_the_first_call_of_a_sequence_leaves_no_empty_one(self, tmp_path: Path) -> None:
        path, z = tmp_path / "t", scores(1, 0)
        with TraceWriter(path, header(2)) as writer:
            for layer in range(2):
                writer.record(layer, "decode", z, top(z), top(z))
            writer.begin_sequence()
            writer.record(0, "decode", z, top(z), top(z))  # cut off before the second layer
        first, second = read_trace(path).layers
        assert (first.sequences, second.sequences) == (((0, True), (1, True)), ((0, True),))
        for x in (first, second):
            replay_strategy(x, x.scores(), 5, "lru", CachePrior(0.1, 1), starts_of(x, 5, "empty"))

    def test_by_a_killed_process_leaves_a_readable_file(self, tmp_path: Path) -> None:
        program = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from made_traces import header, scores, top
from mlx_moecache.study.trace import TraceWriter
writer = TraceWriter(Path(sys.argv[1]), header(1))
z = scores(1, 0)
for i in range(10**9):
    writer.record(0, "decode", z, top(z), top(z))
    if i == 20_000:
        print("running", flush=True)
"""
        command = [sys.executable, "-c", program, str(tmp_path / "t"), str(Path(__file__).parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "running\n"
            os.kill(process.pid, signal.SIGKILL)
        (layer,) = read_trace(tmp_path / "t").layers
        assert layer.tokens > 10_000 and (layer.own == top(scores(1, 0))).all()


class TestContinued:
    def test_a_second_run_of_the_same_kind_is_appended(self, tmp_path: Path) -> None:
        write_calls(tmp_path / "t", [(0, "prefill", 4), (0, "decode", 1)])
        write_calls(tmp_path / "t", [(0, "prefill", 2)])
        assert read_trace(tmp_path / "t").layers[0].calls.tolist() == [0, 4, 5, 7]

    def test_an_empty_file_is_begun(self, tmp_path: Path) -> None:
        (tmp_path / "t").touch()
        write_calls(tmp_path / "t", [(0, "decode", 1)])
        assert read_trace(tmp_path / "t").layers[0].tokens == 1

    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"config_sha256": "1" * 64}, "config sha256"),
            ({"routing": "cache-prior:strength=0.1,j=2"}, "routing"),
            ({"layers": 3}, "layers"),
        ],
    )
    def test_another_run_is_refused_and_the_file_kept(self, tmp_path: Path, changes: dict[str, Any], what: str) -> None:
        write_calls(tmp_path / "t", [(0, "decode", 1)])
        before = (tmp_path / "t").read_bytes()
        with pytest.raises(UsageError, match=rf"the trace of another run \({what} differs\); choose a new file name"):
            TraceWriter(tmp_path / "t", header(**changes))
        assert (tmp_path / "t").read_bytes() == before

    def test_a_file_that_is_no_trace_is_refused_and_kept(self, tmp_path: Path) -> None:
        (tmp_path / "t").write_text("my diary, of which there is no copy anywhere")
        with pytest.raises(UsageError, match="is not a trace"):
            TraceWriter(tmp_path / "t", header())
        assert "diary" in (tmp_path / "t").read_text()


class TestRefused:
    @pytest.mark.parametrize("content", [b"", b"MOE", b"\x93NUMPY" * 9, b"MOETRACE"])
    def test_what_is_no_trace(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "t").write_bytes(content)
        with pytest.raises(UsageError, match="is not a trace; give a file that was recorded with --trace"):
            read_trace(tmp_path / "t")

    def test_another_version(self, tmp_path: Path) -> None:
        write_calls(tmp_path / "t", [(0, "decode", 1)])
        data = bytearray((tmp_path / "t").read_bytes())
        data[8] = 7
        (tmp_path / "t").write_bytes(data)
        with pytest.raises(UsageError, match="is a trace of version 7, and only version 1 is read; record it again"):
            read_trace(tmp_path / "t")

    def test_a_damaged_header(self, tmp_path: Path) -> None:
        write_calls(tmp_path / "t", [(0, "decode", 1)])
        whole = (tmp_path / "t").read_bytes()
        for content in (whole[:40], whole.replace(b'"experts"', b'"expertz"')):
            (tmp_path / "t").write_bytes(content)
            with pytest.raises(UsageError, match="is a trace with a damaged header; record it again"):
                read_trace(tmp_path / "t")

    def test_a_run_that_ended_before_its_first_token(self, tmp_path: Path) -> None:
        with TraceWriter(tmp_path / "t", header()) as writer:
            writer.begin_sequence()
        with pytest.raises(UsageError, match=r"holds no routing: .* run it again"):
            read_trace(tmp_path / "t")


def test_the_header_identifies_the_model_by_its_config() -> None:
    layers = header().layers
    head = TraceHeader.of(DEMO_MODEL, layers, model="demo_model", routing="original", eviction="lru")
    digest = hashlib.sha256((DEMO_MODEL / "config.json").read_bytes()).hexdigest()
    assert head == TraceHeader("demo_model", "qwen2_moe", digest, layers, "original", "lru")
