"""One emulated device for many batches: nothing is faster than the device, and demand hardly waits for speculation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_moecache.checkpoints.emulated_flash import EmulatedFlash, FlashQueue

SPEED, GRAIN = 1000.0, 50  # bytes per second, bytes
moments = st.floats(0, 20)
batches = st.lists(st.tuples(moments, st.integers(1, 5000), st.booleans()), min_size=1, max_size=8).map(sorted)
latencies = st.sampled_from([0.0, 0.5])


def queue(latency: float = 0.0) -> FlashQueue:
    return FlashQueue(EmulatedFlash(SPEED, latency), GRAIN)


def test_one_batch_takes_its_latency_and_its_bytes_at_full_speed() -> None:
    device = queue(0.25)
    transfer = device.add(10.0, 500, ahead=False)
    assert device.end_of(transfer) == pytest.approx(10.75)
    device.advance(10.7)
    assert transfer.ended is None
    device.advance(10.8)
    assert transfer.ended == pytest.approx(10.75)


def test_latencies_pass_side_by_side_and_transfers_one_after_the_other() -> None:
    device = queue(1.0)
    first, second = device.add(0.0, 500, ahead=False), device.add(0.0, 500, ahead=False)
    assert (device.end_of(first), device.end_of(second)) == pytest.approx((1.5, 2.0))


@given(batches, latencies)
def test_the_device_is_never_faster_than_its_speed_and_never_idle_with_work(
    batches: list[tuple[float, int, bool]], latency: float
) -> None:
    device = queue(latency)
    transfers = [device.add(at, nbytes, ahead=ahead) for at, nbytes, ahead in batches]
    device.advance(1e6)
    ends = [transfer.ended for transfer in transfers]
    assert all(end is not None for end in ends)
    known = [end or 0.0 for end in ends]
    for (at, nbytes, _), end in zip(batches, known, strict=True):
        assert end >= at + latency + nbytes / SPEED - 1e-6
    # In any span, what came and went inside it fits through the device.
    for start, _, _ in batches:
        for end in known:
            inside = [n for (at, n, _), e in zip(batches, known, strict=True) if at >= start and e <= end]
            assert sum(inside) / SPEED <= max(0.0, end - start) + 1e-6
    total = sum(nbytes for _, nbytes, _ in batches) / SPEED
    assert max(known) <= batches[-1][0] + latency + total + 1e-6


@given(batches, moments, st.integers(1, 5000), latencies)
def test_a_demand_waits_for_what_was_asked_ahead_no_longer_than_for_the_pieces_in_flight(
    batches: list[tuple[float, int, bool]], at: float, nbytes: int, latency: float
) -> None:
    device = queue(latency)
    for when, size, _ in [b for b in batches if b[0] <= at]:
        device.add(when, size, ahead=True)
    demand = device.add(at, nbytes, ahead=False)
    for when, size, _ in [b for b in batches if b[0] > at]:
        device.add(when, size, ahead=True)
    assert device.end_of(demand) <= at + latency + (nbytes + GRAIN) / SPEED + 1e-6


def test_a_demand_does_wait_for_pieces_in_flight() -> None:
    device = queue()
    device.add(0.0, 1000, ahead=True)
    demand = device.add(0.5, 100, ahead=False)
    assert device.end_of(demand) == pytest.approx(0.5 + (GRAIN + 100) / SPEED)


def test_a_promoted_batch_is_served_before_those_that_stay_ahead() -> None:
    device = queue()
    device.add(0.0, 1000, ahead=True)
    wanted = device.add(0.0, 200, ahead=True)
    device.promote(wanted)
    assert device.end_of(wanted) == pytest.approx(0.2)


class TestCancelling:
    def test_what_is_in_flight_is_still_delivered_and_the_rest_is_saved(self) -> None:
        device = queue()
        transfer = device.add(0.0, 1000, ahead=True)
        other = device.add(0.0, 100, ahead=True)
        assert device.cancel(0.25, transfer) == pytest.approx(0.75 - GRAIN / SPEED)
        assert device.end_of(transfer) == pytest.approx(0.25 + GRAIN / SPEED)
        assert device.end_of(other) == pytest.approx(0.25 + (GRAIN + 100) / SPEED)

    def test_a_batch_whose_latency_still_runs_costs_nothing(self) -> None:
        device = queue(1.0)
        transfer = device.add(0.0, 1000, ahead=True)
        assert device.cancel(0.5, transfer) == pytest.approx(1.0)
        assert device.end_of(transfer) == pytest.approx(0.5)

    def test_a_batch_that_was_delivered_saves_nothing(self) -> None:
        device = queue()
        transfer = device.add(0.0, 100, ahead=True)
        assert device.cancel(5.0, transfer) == 0.0
        assert transfer.ended == pytest.approx(0.1)


def test_batches_of_equal_size_are_told_apart() -> None:
    device = queue()
    first, second = (device.add(0.0, 100, ahead=True) for _ in range(2))
    device.promote(second)
    assert device.end_of(second) == pytest.approx(0.1)
    assert device.end_of(first) == pytest.approx(0.2)
