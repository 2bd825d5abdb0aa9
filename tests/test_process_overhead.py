"""What the process takes beside arrays and host buffers: charged in the plan, and freed buffers do not add to it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mlx_moecache import system
from mlx_moecache.budget import OVERHEAD
from mlx_moecache.demo import demo_model
from mlx_moecache.errors import ReadError
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel

# Frees blocks of 8 and then 1 MB, each time beside a small one that stays behind it; then says what is left of them.
HOARDER = """
import ctypes, json, sys
from mlx_moecache import system
if sys.argv[1] == "returned":
    system.return_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.free(libc.malloc(8 << 20))
before = system.process_footprint()
large = []
for _ in range(20):
    large.append(libc.malloc(1 << 20))
    ctypes.memset(large[-1], 1, 1 << 20)
    libc.malloc(2000)
for block in large:
    libc.free(block)
print(json.dumps(system.process_footprint() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")
def test_freed_buffers_leave_the_footprint() -> None:
    def left(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", HOARDER, how], capture_output=True, text=True, check=True)
        return int(json.loads(done.stdout))

    assert left("returned") < 2**20 < 15 * 2**20 < left("kept")


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: object) -> object:
        raise AssertionError("no C library is asked for")

    monkeypatch.setattr(system.ctypes, "CDLL", refuse)
    monkeypatch.setattr(sys, "platform", "darwin")
    system.return_freed_memory()


def test_a_c_library_without_that_setting_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system.ctypes, "CDLL", lambda name: object())
    monkeypatch.setattr(sys, "platform", "linux")
    system.return_freed_memory()


def test_the_overhead_is_a_part_of_the_plan_and_of_the_budget() -> None:
    opened = OpenedModel(demo_model())
    plan = opened.plan(MemoryOptions(memory="12MB", max_context=256))
    assert plan.parts()["overhead"] == plan.overhead == OVERHEAD
    assert sum(plan.parts().values()) == plan.total == plan.buffers + OVERHEAD <= 12_000_000
    assert plan.room == plan.room_beside(plan.slots)
    assert plan.room is not None and plan.room + plan.resident + plan.slots + plan.host_buffers + OVERHEAD < 12_000_000


def test_the_plan_stays_if_resizing_to_a_budget_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = OpenedModel(demo_model()).load(MemoryOptions(memory="12MB", max_context=256), CacheOptions())
    before, slots = model.memory_plan, model.expert_cache.slots_per_layer

    def fail(*args: object) -> None:
        raise ReadError("the disk is gone")

    with monkeypatch.context() as patch, pytest.raises(ReadError):
        patch.setattr(model.expert_cache, "_resize_layer", fail)
        model.expert_cache.resize(memory="14MB")
    assert model.memory_plan is before and model.expert_cache.slots_per_layer == slots
    model.expert_cache.resize(memory="14MB")
    assert model.memory_plan is not before
    assert list(model.memory_plan.slots_per_layer) == model.expert_cache.slots_per_layer
    assert model.memory_plan.budget == 14_000_000 and model.memory_plan.overhead == OVERHEAD
    model.expert_cache.close()
