"""What the live page is told: what is resident and used, how a reply goes, and that telling costs next to nothing."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_moecache import load
from mlx_moecache.conversation import Conversation
from mlx_moecache.demo import demo_model
from mlx_moecache.residents import Residents
from mlx_moecache.routing import Original
from mlx_moecache.serving.live import LiveView
from mlx_moecache.stats import CacheStats

SLOTS = 30  # of the demo model's 60 experts; each token uses 4


def experts_in(bitmap: str) -> list[int]:
    return np.flatnonzero(np.unpackbits(np.frombuffer(base64.b64decode(bitmap), np.uint8), bitorder="little")).tolist()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return load(str(demo_model()), slots=SLOTS, max_context=128, routing="cache-prior:strength=0.2,j=1")


@pytest.fixture
def view(demo: tuple[Any, Any]) -> Iterator[LiveView]:
    demo[0].expert_cache.reset()
    view = LiveView(demo[0], name="demo", has_template=False)
    view.start()
    yield view
    view.stop()


def reply(demo: tuple[Any, Any], view: LiveView, tokens: int = 12) -> None:
    """As the server's worker does it."""
    model, tokenizer = demo
    conversation = Conversation(model, tokenizer, max_context=128)
    kv = conversation.kv_cache
    view.began()
    prompt = tokenizer.encode("Once upon a time there was a small dog.")
    for response in conversation.stream(
        prompt, max_tokens=tokens, prompt_progress=lambda done, total: view.read(done, total, kv)
    ):
        view.wrote(response, kv)
    view.ended(kv)


class TestWithAModel:
    def test_a_snapshot_before_anything_ran_is_json_and_shows_an_empty_cache_with_its_memory(
        self, demo: tuple[Any, Any], view: LiveView
    ) -> None:
        s = json.loads(json.dumps(view.snapshot(), allow_nan=False))
        assert (s["model"], s["has_template"], s["state"]) == ("demo", False, "idle")
        assert (s["experts"], s["slots"], s["active"]) == ([60] * 6, [SLOTS] * 6, [4] * 6)
        assert all(experts_in(x) == [] for x in s["resident"] + s["used"] + s["missed"])
        assert s["decode"]["hit_rate"] is None and s["reply"]["bytes_per_token"] is None
        assert s["memory"]["parts"]["expert slots"] == demo[0].expert_cache.nbytes
        assert s["memory"]["budget"] is None and s["memory"]["plan"] == demo[0].memory_plan.total

    def test_after_a_reply_it_shows_what_is_resident_and_the_counters_of_that_reply_alone(
        self, demo: tuple[Any, Any], view: LiveView
    ) -> None:
        cache = demo[0].expert_cache
        reply(demo, view)
        before = cache.stats.copy()
        reply(demo, view)
        counted = cache.stats - before
        s = view.snapshot()
        assert [experts_in(x) for x in s["resident"]] == [sorted(x.residents.experts) for x in cache.layers]
        assert all(8 < len(experts_in(x)) <= SLOTS for x in s["resident"])
        assert (s["state"], s["reply"]["tokens"], s["prompt"]["done"]) == ("idle", 12, s["prompt"]["tokens"])
        assert s["prompt"]["tokens"] > 5 and s["reply"]["tps"] > 0
        assert s["decode"]["selections"] == counted.decode.selections == 11 * 6 * 4
        assert s["decode"]["hits"] == counted.decode.hits
        assert s["reply"]["bytes_per_token"] == counted.decode.bytes_read / 11
        assert s["routing"]["parameters"] == {"strength": 0.2, "j": 1}
        assert s["routing"]["exact"] is False and counted.decode.swapped > 0
        assert s["memory"]["parts"]["KV cache"] > 0
        assert s["memory"]["peak"] == pytest.approx(sum(s["memory"]["parts"].values()))

    def test_while_a_reply_runs_its_state_is_prompt_and_then_reply(
        self, demo: tuple[Any, Any], view: LiveView, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        states: list[str] = []
        monkeypatch.setattr(LiveView, "used", lambda *_: states.append(view.snapshot()["state"]))
        reply(demo, view)
        assert states[0] == "prompt" and states[-1] == "reply"
        assert states == sorted(states)  # never back to the prompt

    def test_experts_that_ran_are_those_that_the_blocks_reported_and_changes_grows(
        self, demo: tuple[Any, Any], view: LiveView, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: list[set[int]] = [set() for _ in range(6)]
        missed: list[set[int]] = [set() for _ in range(6)]
        inner = LiveView.used

        def used(self: LiveView, layer: int, phase: str, experts: list[int], lacking: list[int]) -> None:
            told[layer].update(experts)
            missed[layer].update(lacking)
            inner(self, layer, phase, experts, lacking)

        monkeypatch.setattr(LiveView, "used", used)
        changes = view.changes
        reply(demo, view)
        s = view.snapshot()
        assert [set(experts_in(x)) for x in s["used"]] == told
        assert [set(experts_in(x)) for x in s["missed"]] == missed
        assert view.changes >= changes + 6 * 12

    def test_original_routing_is_exact_and_a_stopped_view_hears_nothing(
        self, demo: tuple[Any, Any], view: LiveView
    ) -> None:
        cache = demo[0].expert_cache
        biased = cache.strategy
        cache.set_strategy("original")
        try:
            reply(demo, view)
            assert view.snapshot()["routing"] == {"name": "original", "parameters": {}, "exact": True}
            cache.set_strategy("pruning:k=3")
            assert view.snapshot()["routing"]["exact"] is False
        finally:
            cache.set_strategy(biased)
        view.stop()
        assert cache.listener is None
        time.sleep(0.01)  # past the overlap of snapshots
        time_of_last = view.snapshot()["time"]
        reply(demo, view)
        assert all(experts_in(x) == [] for x in view.snapshot(time_of_last)["used"])

    def test_resized_slots_show_at_once(self, demo: tuple[Any, Any], view: LiveView) -> None:
        cache = demo[0].expert_cache
        reply(demo, view)
        view.snapshot()
        cache.resize(slots=10)
        try:
            s = view.snapshot()
            assert s["slots"] == [10] * 6 and all(0 < len(experts_in(x)) <= 10 for x in s["resident"])
        finally:
            cache.resize(slots=SLOTS)


def wide_model(layers: int = 60, experts: int = 512, slots: int = 96) -> Any:
    """What LiveView needs of a model, without arrays."""
    made = [
        SimpleNamespace(residents=Residents(experts, slots, "lru"), num_experts=experts, k=8) for _ in range(layers)
    ]
    return SimpleNamespace(
        memory_plan=SimpleNamespace(budget=None, total=1),
        expert_cache=SimpleNamespace(
            layers=made,
            stats=CacheStats(),
            strategy=Original(),
            experts_per_layer=[experts] * layers,
            slots_per_layer=[slots] * layers,
            listener=None,
        ),
    )


def bring(residents: Residents, experts: list[int]) -> None:
    residents.publish(residents.plan(experts))
    residents.touch([(e, 1) for e in experts])


class TestOnItsOwn:
    def test_each_snapshot_shows_what_was_used_since_an_earlier_one_whoever_else_looks(self) -> None:
        clock = Clock()
        view = LiveView(wide_model(2, 12, 8), clock=clock)
        view.used(0, "decode", [1, 9], [9])
        clock.now += 1
        first = view.snapshot()
        assert [experts_in(x) for x in first["used"]] == [[1, 9], []]
        assert [experts_in(x) for x in first["missed"]] == [[9], []]
        clock.now += 1
        view.used(1, "decode", [11], [])
        assert [experts_in(x) for x in view.snapshot(first["time"])["used"]] == [[], [11]]
        assert [experts_in(x) for x in view.snapshot(first["time"])["used"]] == [[], [11]]
        assert [experts_in(x) for x in view.snapshot()["used"]] == [[1, 9], [11]]

    def test_an_expert_that_was_missed_and_then_hit_is_not_missed_any_more(self) -> None:
        clock = Clock()
        view = LiveView(wide_model(1, 12, 8), clock=clock)
        view.used(0, "decode", [3], [3])
        clock.now += 1
        seen = view.snapshot()["time"]
        clock.now += 1
        view.used(0, "decode", [3], [])
        s = view.snapshot(seen)
        assert experts_in(s["used"][0]) == [3] and experts_in(s["missed"][0]) == []

    def test_snapshots_are_whole_while_another_thread_computes(self) -> None:
        model = wide_model(4, 64, 16)
        view = LiveView(model)
        stop = threading.Event()
        failures: list[BaseException] = []
        rng = np.random.default_rng(0)
        calls = rng.integers(0, 64, size=(200, 8)).tolist()

        def compute() -> None:
            try:
                while not stop.is_set():
                    for call in calls:
                        for i, layer in enumerate(model.expert_cache.layers):
                            needed = list(dict.fromkeys(call))
                            bring(layer.residents, needed)
                            view.used(i, "decode", needed, needed[:1])
            except BaseException as e:
                failures.append(e)

        thread = threading.Thread(target=compute)
        thread.start()
        try:
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                s = view.snapshot()
                # The set is copied between an eviction and what replaces it, at the earliest.
                assert all(len(experts_in(x)) <= 16 + 8 for x in s["resident"])
        finally:
            stop.set()
            thread.join()
        assert not failures
        assert [experts_in(x) for x in view.snapshot()["resident"]] == [
            sorted(x.residents.experts) for x in model.expert_cache.layers
        ]

    def test_the_listener_takes_microseconds_and_a_snapshot_of_60_by_512_few_milliseconds(self) -> None:
        model = wide_model()
        view = LiveView(model)
        rng = np.random.default_rng(1)
        calls = [rng.choice(512, 8, replace=False).tolist() for _ in range(60)]
        for layer, call in zip(model.expert_cache.layers, calls, strict=True):
            bring(layer.residents, call)

        def best(run: Any, times: int) -> float:
            took = []
            for _ in range(times):
                began = time.perf_counter()
                run()
                took.append(time.perf_counter() - began)
            return min(took)  # what it costs, whatever else the machine does

        def token() -> None:
            for i, call in enumerate(calls):
                view.used(i, "decode", call, call[:2])

        per_call = best(token, 50) / 60
        snapshot = best(view.snapshot, 20)
        size = len(json.dumps(view.snapshot()))
        print(f"used {1e6 * per_call:.2f} us, snapshot {1e3 * snapshot:.2f} ms, {size} bytes of JSON")
        assert per_call < 10e-6
        assert snapshot < 20e-3
        assert size < 32_000
