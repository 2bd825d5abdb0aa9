"""Slot arrays: views that MLX sees, the fence, and moving to other sizes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_moecache import slots
from mlx_moecache.checkpoints.expert_layout import ComponentSpec
from mlx_moecache.errors import UnsupportedModelError
from mlx_moecache.slots import MAX_ELEMENTS, SlotPool

FLOATS = ComponentSpec("up_proj.weight", "float32", (2, 3))
HALVES = ComponentSpec("up_proj.scales", "bfloat16", (5,))
PACKED = ComponentSpec("down_proj.weight", "uint32", (4,))


def fill(pool: SlotPool, component: int, slot: int, value: int) -> None:
    view = pool.view(component, slot)
    view[:] = bytes([value]) * len(view)


class TestViews:
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint32", "uint8"])
    def test_bytes_written_to_a_view_are_the_arrays_and_stay_in_their_slot(self, dtype: str) -> None:
        pool = SlotPool([ComponentSpec("w", dtype, (3, 4))], 3)
        assert pool.arrays["w"].shape == (3, 3, 4) and pool.arrays["w"].dtype == getattr(mx, dtype)
        fill(pool, 0, 1, 0x3F)
        raw = np.array(pool.arrays["w"].view(mx.uint8))
        assert (raw[1] == 0x3F).all() and not raw[0].any() and not raw[2].any()

    def test_each_component_has_its_own_array(self) -> None:
        pool = SlotPool([FLOATS, HALVES, PACKED], 2)
        assert [len(pool.view(c, 0)) for c in range(3)] == [24, 10, 16]
        assert pool.nbytes == 2 * 50 == sum(a.nbytes for a in pool.arrays.values())

    def test_arrays_beyond_the_limit_of_mlx_are_refused_before_they_are_made(self) -> None:
        huge = ComponentSpec("w", "uint8", (MAX_ELEMENTS // 2 + 1,))
        with pytest.raises(UnsupportedModelError, match=r"2 slots .*fewer --slots"):
            SlotPool([huge], 2)


class TestFence:
    def test_a_pending_operation_sees_the_old_bytes_if_it_is_fenced(self) -> None:
        pool = SlotPool([FLOATS], 2)
        pending = pool.arrays[FLOATS.name] + 1
        pool.track(pending)
        pool.fence()
        fill(pool, 0, 0, 0x40)
        assert (np.array(pending) == 1).all()

    def test_without_the_fence_it_would_see_the_new_ones(self) -> None:
        """The hazard itself: if MLX ever copies here, the fence can go."""
        pool = SlotPool([FLOATS], 2)
        pending = pool.arrays[FLOATS.name] + 1
        fill(pool, 0, 0, 0x40)
        assert (np.array(pending)[0] != 1).all()

    def test_all_tracked_outputs_are_evaluated_not_only_the_last(self) -> None:
        pool = SlotPool([FLOATS], 2)
        outputs = [pool.arrays[FLOATS.name] + i for i in range(5)]
        for y in outputs:
            pool.track(y)
        pool.fence()
        fill(pool, 0, 1, 0x40)
        assert all((np.array(y) == i).all() for i, y in enumerate(outputs))

    def test_outputs_are_taken_once_and_all_of_them(self) -> None:
        pool = SlotPool([FLOATS], 2)
        outputs = [pool.arrays[FLOATS.name] * 2 + i for i in range(3)]
        for y in outputs:
            pool.track(y)
        taken = pool.take_unfenced()
        assert [a is b for a, b in zip(taken, outputs, strict=True)] == [True] * 3
        assert pool.take_unfenced() == []
        mx.eval(*taken)
        fill(pool, 0, 0, 0x40)
        assert all((np.array(y) == i).all() for i, y in enumerate(outputs))


class TestResize:
    @pytest.mark.parametrize(("slots", "moves"), [(4, {0: 3, 2: 0}), (2, {2: 0, 1: 1}), (3, {0: 1, 1: 0, 2: 2})])
    def test_bytes_go_where_they_are_told_and_the_rest_is_empty(self, slots: int, moves: dict[int, int]) -> None:
        pool = SlotPool([FLOATS, HALVES], 3)
        for c in range(2):
            for slot in range(3):
                fill(pool, c, slot, 10 * c + slot + 1)
        pool.resize(slots, moves)
        for c, component in enumerate((FLOATS, HALVES)):
            expected = [0] * slots
            for old, new in moves.items():
                expected[new] = 10 * c + old + 1
            raw = np.array(pool.arrays[component.name].view(mx.uint8)).reshape(slots, -1)
            assert [set(row.tolist()) for row in raw] == [{v} for v in expected]
            assert [set(bytes(pool.view(c, s))) for s in range(slots)] == [{v} for v in expected]

    @pytest.mark.parametrize("slots", [20, 60])
    def test_no_more_than_one_component_exists_twice(self, slots: int) -> None:
        parts = [
            ComponentSpec(f"{name}.weight", "uint32", (1000, 10)) for name in ("gate_proj", "up_proj", "down_proj")
        ]
        pool = SlotPool(parts, 40)
        switch = dict(pool.arrays)  # what computes with them holds them, too
        output = switch["up_proj.weight"].sum()
        pool.track(output)
        component = 40_000
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        pool.resize(slots, {s: s for s in range(20)}, lambda: switch.update(pool.arrays))
        grown = 3 * (slots - 40) * component
        assert abs(mx.get_active_memory() - before - grown) < component
        assert mx.get_peak_memory() - before <= max(0, grown) + max(slots, 40) * component + component

    def test_what_cannot_be_made_is_refused_before_anything_moves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pool = SlotPool([HALVES, FLOATS], 1)
        before = dict(pool.arrays)
        monkeypatch.setattr(slots, "MAX_ELEMENTS", 20)
        with pytest.raises(UnsupportedModelError, match=r"4 slots of up_proj.weight .*fewer --slots"):
            pool.resize(4, {0: 0})
        assert pool.arrays == before and pool.slots == 1

    def test_pending_operations_keep_the_old_bytes(self) -> None:
        pool = SlotPool([FLOATS], 2)
        fill(pool, 0, 0, 0x40)
        pending = pool.arrays[FLOATS.name] * 1
        before = np.array(pool.arrays[FLOATS.name])
        pool.track(pending)
        pool.resize(3, {})
        fill(pool, 0, 0, 0x41)
        assert (np.array(pending) == before).all()
