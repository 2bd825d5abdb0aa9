"""What "auto" means on this machine, before and after a model holds memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import Shelf

from mlx_moecache import system
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel, budget_here

GB = 10**9


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, int | None]:
    """A fake machine with 16 GB of RAM, 10 of them available; this process has 200 MB."""
    facts: dict[str, int | None] = {"ram": 16 * GB, "available": 10 * GB, "footprint": 200_000_000, "working": None}
    monkeypatch.setattr(system, "physical_memory", lambda: facts["ram"])
    monkeypatch.setattr(system, "available_memory", lambda: facts["available"])
    monkeypatch.setattr(system, "process_footprint", lambda: facts["footprint"])
    monkeypatch.setattr(system, "recommended_working_set", lambda: facts["working"])
    return facts


def test_it_leaves_an_eighth_of_ram_of_what_is_available(machine: dict[str, int | None]) -> None:
    assert budget_here("auto") == 8 * GB


def test_it_is_never_more_than_ram_allows_beside_this_process(machine: dict[str, int | None]) -> None:
    machine["available"] = 16 * GB
    assert budget_here("auto") == int(0.7 * 16 * GB) - 200_000_000
    machine["available"] = machine["footprint"] = None
    assert budget_here("auto") == int(0.7 * 16 * GB)


def test_the_working_set_of_the_device_limits_it(machine: dict[str, int | None]) -> None:
    machine["working"] = 5 * GB
    assert budget_here("auto") == 5 * GB


def test_other_sizes_do_not_depend_on_what_is_available(machine: dict[str, int | None]) -> None:
    assert budget_here("12GB") == 12 * GB and budget_here("50%") == 8 * GB


def test_a_resize_to_auto_counts_what_the_model_holds_as_available(
    machine: dict[str, int | None], shelf: Shelf
) -> None:
    path: Path = shelf.checkpoint("qwen2_moe")
    model = OpenedModel(path).load(MemoryOptions(memory="auto", max_context=64), CacheOptions())
    assert model.memory_plan.budget == 8 * GB
    held = model.memory_plan.resident + model.expert_cache.nbytes
    machine["available"], machine["footprint"] = 10 * GB - held, 200_000_000 + held
    model.expert_cache.resize(memory="auto")
    assert model.memory_plan.budget == 8 * GB
    model.expert_cache.close()


@pytest.mark.skipif(system.available_memory() is None, reason="this system does not say what is available")
def test_this_machine_gives_something() -> None:
    budget = budget_here("auto")
    assert 0 < budget < system.physical_memory()
