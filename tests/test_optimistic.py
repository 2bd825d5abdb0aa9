"""Looking once after several layers: the bits, hits, evictions and counters of looking after each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache
from tiny_models import (
    MODEL_TYPES,
    Shelf,
    decode_figures,
    num_experts,
    random_tokens,
    run_model,
    same_bits,
    tiny_config,
)

from mlx_moecache.demo import DEMO_MODEL
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.span import SpanChooser, best_span, expected

LENGTHS = [16] + [1] * 24
TOKENS = random_tokens(1, sum(LENGTHS))
ROUTINGS = ["original", "cache-prior:strength=0.3,j=1", "price:delta=0.1,j=1", "pruning:k=2"]
COUNTED = ("selections", "hits", "misses", "loads", "bytes_read", "swapped", "evictions")


def load(
    path: Path, span: int, *, slots: int, routing: str = "original", eviction: str = "lru", memory: Any = None
) -> nn.Module:
    model = OpenedModel(path).load(MemoryOptions(slots=slots), CacheOptions(routing=routing, eviction=eviction))
    model.expert_cache.optimist.chooser = Fixed(len(model.expert_cache.layers), 1e-6, span)
    return model


class Fixed(SpanChooser):
    """Never revises its span."""

    def observe(self, missed: int, run: int, host_reads: int, seconds: float) -> None:
        self.seen = [*getattr(self, "seen", []), (missed, run, host_reads)]


class TestTheOutput:
    @pytest.mark.parametrize("layout", ["float32", "4bit"])
    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_has_the_bits_of_stock_and_the_counts_of_looking_each_time(
        self, shelf: Shelf, model_type: str, layout: str
    ) -> None:
        path = shelf.checkpoint(model_type, layout)  # type: ignore[arg-type]
        slots = 3 * num_experts(tiny_config(model_type)) // 4
        each, once = (load(path, span, slots=slots) for span in (1, 99))
        logits = run_model(once, TOKENS, LENGTHS)
        assert same_bits(logits, run_model(shelf.stock(path), TOKENS, LENGTHS))
        run_model(each, TOKENS, LENGTHS)
        assert decode_figures(once, COUNTED) == decode_figures(each, COUNTED)
        assert once.expert_cache.stats.decode.misses > 0

    @pytest.mark.parametrize(
        ("slots", "routing", "eviction"),
        [*((s, r, "lru") for r in ROUTINGS for s in (15, 45)), (59, ROUTINGS[1], "lru"), (30, ROUTINGS[2], "decay")],
    )
    def test_of_the_demo_model_is_that_of_looking_each_time(self, slots: int, routing: str, eviction: str) -> None:
        tokens = _story()
        runs = []
        for span in (1, 2, 3, 6):
            model = load(DEMO_MODEL, span, slots=slots, routing=routing, eviction=eviction)
            runs.append((run_model(model, tokens, [60] + [1] * 40), decode_figures(model, COUNTED)))
        for logits, counted in runs[1:]:
            assert same_bits(logits, runs[0][0])
            assert counted == runs[0][1]

    def test_is_right_with_a_quantised_kv_cache(self) -> None:
        tokens, logits = _story(), []
        for span in (1, 6):
            model = load(DEMO_MODEL, span, slots=45)
            kv: list[Any] = [QuantizedKVCache(32, 8) for _ in model.layers]
            model(tokens[:, :60], cache=kv)
            logits.append(mx.concatenate([model(tokens[:, i : i + 1], cache=kv) for i in range(60, 90)], axis=1))
            mx.eval(logits[-1])
        assert same_bits(logits[0], logits[1])


class TestHostReads:
    def test_are_fewer_and_one_if_nothing_is_missing(self) -> None:
        model = load(DEMO_MODEL, 6, slots=59)
        kv = make_prompt_cache(model)
        tokens = _story()
        mx.eval(model(tokens[:, :60], cache=kv))
        per_token = []
        for i in range(60, 100):
            before = model.expert_cache.stats.decode.host_reads, model.expert_cache.stats.decode.misses
            mx.eval(model(tokens[:, i : i + 1], cache=kv))
            stats = model.expert_cache.stats.decode
            per_token.append((stats.host_reads - before[0], stats.misses - before[1]))
        assert per_token[0][0] == 6  # the first token shows how the layers are connected
        assert [reads for reads, misses in per_token[1:] if not misses] and all(
            reads == 1 for reads, misses in per_token[1:] if not misses
        )
        assert all(reads <= 1 + misses for reads, misses in per_token[1:])

    def test_are_those_of_each_layer_where_the_kv_cache_cannot_be_trimmed(self) -> None:
        model = load(DEMO_MODEL, 6, slots=59)
        kv = make_prompt_cache(model, max_kv_size=32)
        tokens = _story()
        for i in range(80):
            mx.eval(model(tokens[:, i : i + 1], cache=kv))
        before = model.expert_cache.stats.decode.host_reads
        mx.eval(model(tokens[:, 80:81], cache=kv))
        assert model.expert_cache.stats.decode.host_reads - before == 6

    def test_and_layers_run_are_told_to_the_chooser(self) -> None:
        model = load(DEMO_MODEL, 6, slots=59)
        tokens = _story()
        run_model(model, tokens, [60] + [1] * 30)
        seen = model.expert_cache.optimist.chooser.seen
        assert all(run >= 6 for _, run, _ in seen) and len(seen) >= 28
        assert all(reads <= 1 + missed and (missed or run == 6) for missed, run, reads in seen[1:])
        assert {missed for missed, _, _ in seen} > {0}


class TestWhileWatched:
    def test_every_layer_looks(self) -> None:
        model = load(DEMO_MODEL, 6, slots=59)

        class Nobody:
            def observe(self, call: Any) -> None:
                pass

        with model.expert_cache.observed_by(Nobody()):
            run_model(model, _story(), [1] * 10)
        assert model.expert_cache.stats.decode.host_reads == 60


class TestChoosing:
    def test_looking_each_time_is_best_where_looks_are_cheap_or_misses_frequent(self) -> None:
        assert best_span(1.0, 1e-6, 1e-3, 48) == 1
        assert best_span(0.5, 1e-3, 1e-3, 48) == 1

    def test_the_span_grows_with_hits_and_with_the_cost_of_a_look(self) -> None:
        spans = [best_span(p, 5e-4, 5e-4, 48) for p in (0.7, 0.8, 0.9, 0.95, 0.99, 1.0)]
        assert spans == sorted(spans) and spans[-1] == 48 > spans[0]
        spans = [best_span(0.95, h, 5e-4, 48) for h in (1e-5, 1e-4, 5e-4, 2e-3)]
        assert spans == sorted(spans) and spans[-1] > spans[0]

    def test_expectations_are_those_of_a_simulation(self) -> None:
        import random

        rng = random.Random(0)
        reads, vain = expected(6, 0.8)
        seen_reads = seen_vain = 0
        for _ in range(20_000):
            left = 6
            while left:
                seen_reads += 1
                first = next((t for t in range(1, left + 1) if rng.random() > 0.8), None)
                if first is None:
                    break
                seen_vain += left - first + 1
                left -= first
        assert seen_reads / 20_000 == pytest.approx(reads[6], rel=0.02)
        assert seen_vain / 20_000 == pytest.approx(vain[6], rel=0.02)

    def test_is_not_misled_by_pauses_between_tokens(self) -> None:
        chooser = SpanChooser(6, host_read=2e-3)
        for n in range(64):
            chooser.observe(missed=0, run=6, host_reads=6, seconds=6 * 3e-3 + (5.0 if n % 8 == 0 else 0.0))
        assert chooser.compute == pytest.approx(1e-3)
        assert chooser.span == 6

    def test_follows_what_tokens_cost(self) -> None:
        chooser = SpanChooser(48, host_read=5e-4)
        for _ in range(64):
            chooser.observe(0, 48, 48, 48 * 1e-3)
        assert chooser.span == 48
        for _ in range(128):
            chooser.observe(24, 60, 48, 60 * 1e-3)
        assert chooser.span == 1


def _story() -> mx.array:
    tokenizer = OpenedModel(DEMO_MODEL).tokenizer()
    text = (
        "Once upon a time there was a little robot who lived in a garden. One day the robot found a red ball under a "
        "tree. He was very happy and wanted to play with his friend, the cat. The cat was sleeping in the sun. The "
        "robot said, wake up, let us play with the ball! The cat opened her eyes and smiled."
    )
    return mx.array([(tokenizer.encode(text) * 2)[:100]])
