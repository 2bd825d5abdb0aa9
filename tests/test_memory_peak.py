"""The budget is a promise: measured peaks stay within the figure that was given, from loading to the last token."""

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_moecache.demo import demo_model
from mlx_moecache.errors import BudgetError
from mlx_moecache.generation import stream_generate
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel

PROMPT, REPLY = 600, 40  # tokens


def opened() -> OpenedModel:
    return OpenedModel(Path(demo_model()))


def smallest_budget() -> int:
    """The size that the refusal names, as a user would type it back."""
    with pytest.raises(BudgetError) as refused:
        opened().plan(MemoryOptions(memory=1000, max_context=PROMPT + REPLY, max_prompt=PROMPT))
    size, unit = str(refused.value).split("the smallest that works is ")[1].split()[:2]
    return int(float(size) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[unit])


@pytest.mark.parametrize("extra", [0, 2_000_000, 6_000_000, 40_000_000])
@pytest.mark.parametrize("direct_io", [False, True])
def test_generation_stays_within_the_budget(extra: int, direct_io: bool) -> None:
    budget = smallest_budget() + extra + (8_000_000 if direct_io else 0)  # direct I/O reads through buffers of ours
    model_file = opened()
    tokenizer = model_file.tokenizer()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = model_file.load(
        MemoryOptions(memory=budget, max_context=PROMPT + REPLY, max_prompt=PROMPT), CacheOptions(direct_io=direct_io)
    )
    loaded = mx.get_peak_memory() - before
    plan, cache = model.memory_plan, model.expert_cache
    assert plan.total <= budget
    assert loaded <= plan.resident + plan.slots + 64_000_000
    ids = [3 + (i * 7919) % 4000 for i in range(PROMPT)]
    tokens = sum(1 for _ in stream_generate(model, tokenizer, ids, max_tokens=REPLY))
    assert tokens > 0
    assert mx.get_peak_memory() - before + cache.reader.host_buffer_bytes <= budget
    cache.close()


def test_more_budget_means_more_slots_until_all_experts_are_resident() -> None:
    sizes = [smallest_budget() + extra for extra in (0, 1_000_000, 4_000_000, 100_000_000)]
    options = [MemoryOptions(memory=b, max_context=PROMPT + REPLY, max_prompt=PROMPT) for b in sizes]
    slots = [opened().plan(o).slots_per_layer[0] for o in options]
    assert slots == sorted(slots)
    assert slots[0] < slots[2]
    assert slots[-1] == 60
