"""Reading ahead what the next layer may need: the bits, hits, evictions and running ranges of not doing so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from faulty_reads import after_each_read, scribble
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import (
    ALL_TYPES,
    MODEL_TYPES,
    Shelf,
    decode_figures,
    num_experts,
    random_tokens,
    run_model,
    same_bits,
    tiny_config,
)

from mlx_moecache.checkpoints.reader import EmulatedFlash, ExpertReader, ReadRequest
from mlx_moecache.demo import DEMO_MODEL
from mlx_moecache.errors import ReadError
from mlx_moecache.guess import Guesser
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.look_ahead import LookAhead, buffers_for
from mlx_moecache.payoff import Payoff

LENGTHS = [16] + [1] * 24
TOKENS = random_tokens(1, sum(LENGTHS))
ROUTINGS = ["original", "cache-prior:strength=0.3,j=1", "price:delta=0.1,j=1", "pruning:k=2"]
BUFFERS = 4
COUNTED = ("selections", "hits", "misses", "loads", "swapped", "evictions", "host_reads")
WITHOUT_SWITCH_LAYERS = {"dbrx"}
OTHER_DIMENSIONS = {"kimi_k3"}  # its experts work in a space of their own
ONE_MOE_LAYER = {"jamba"}


class Always(Payoff):
    """Takes every chance."""

    def next(self) -> bool:
        return True


def load(path: Path, *, slots: int, ahead: Payoff | None, buffers: int = BUFFERS, **options: Any) -> nn.Module:
    """ahead: None if nothing shall be read ahead."""
    opened = OpenedModel(path)
    model = opened.load(MemoryOptions(slots=slots), CacheOptions(**{"routing": "original", **options}))
    cache = model.expert_cache
    cache.look_ahead = None
    if ahead is not None:
        cache.look_ahead = LookAhead(cache.layers, cache.reader, opened.guessers, buffers=buffers)
        cache.look_ahead.payoff = ahead
    return model


class TestTheOutput:
    @pytest.mark.parametrize("layout", ["float32", "4bit"])
    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_has_the_bits_of_stock_and_the_counts_of_reading_nothing_ahead(
        self, shelf: Shelf, model_type: str, layout: str
    ) -> None:
        path = shelf.checkpoint(model_type, layout)  # type: ignore[arg-type]
        slots = 3 * num_experts(tiny_config(model_type)) // 4
        plain, early = (load(path, slots=slots, ahead=ahead) for ahead in (None, Always()))
        logits = run_model(early, TOKENS, LENGTHS)
        assert same_bits(logits, run_model(shelf.stock(path), TOKENS, LENGTHS))
        run_model(plain, TOKENS, LENGTHS)
        assert decode_figures(early, COUNTED) == decode_figures(plain, COUNTED)
        assert early.expert_cache.stats.decode.read_ahead > 0

    @pytest.mark.matrix
    @pytest.mark.parametrize("model_type", sorted(set(ALL_TYPES) - WITHOUT_SWITCH_LAYERS))
    def test_has_the_bits_of_stock_for_every_type_and_nearly_all_can_guess(self, shelf: Shelf, model_type: str) -> None:
        path = shelf.checkpoint(model_type)
        model = load(path, slots=3 * OpenedModel(path).blocks[0].num_experts // 4, ahead=Always())
        logits = run_model(model, TOKENS, LENGTHS)
        assert same_bits(logits, run_model(shelf.stock(path), TOKENS, LENGTHS))
        guesses = model_type not in OTHER_DIMENSIONS | ONE_MOE_LAYER
        assert (model.expert_cache.stats.decode.read_ahead > 0) == guesses

    @pytest.mark.parametrize("flash", [None, EmulatedFlash(20e6, 1e-4)])
    @pytest.mark.parametrize("routing", ROUTINGS)
    @pytest.mark.parametrize("slots", [6, 30])
    def test_of_the_demo_model_is_that_of_reading_nothing_ahead(
        self, slots: int, routing: str, flash: EmulatedFlash | None
    ) -> None:
        tokens = _story()
        runs = []
        for ahead in (None, Always()):
            model = load(DEMO_MODEL, slots=slots, ahead=ahead, routing=routing, flash=flash)
            runs.append((run_model(model, tokens, [60] + [1] * 30), decode_figures(model, COUNTED)))
        assert same_bits(runs[1][0], runs[0][0])
        assert runs[1][1] == runs[0][1]

    def test_is_the_same_when_the_cache_is_resized_reset_or_restored_in_between(self) -> None:
        tokens, results = _story(), []
        for ahead in (None, Always()):
            model, out = load(DEMO_MODEL, slots=12, ahead=ahead), []
            cache = model.expert_cache
            before = cache.contents()
            for slots in (20, None, 12):
                out.append(run_model(model, tokens, [60] + [1] * 10))
                if slots is None:
                    cache.reset()
                else:
                    cache.resize(slots=slots)
            cache.restore(before)
            out.append(run_model(model, tokens, [60] + [1] * 10))
            results.append((out, decode_figures(model, COUNTED)))
        assert all(same_bits(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
        assert results[0][1] == results[1][1]


class TestGuesses:
    def test_of_text_are_mostly_right(self) -> None:
        model = load(DEMO_MODEL, slots=15, ahead=Always())
        run_model(model, _story(), [60] + [1] * 60)
        s = model.expert_cache.stats.decode
        assert s.read_ahead_used > 0.5 * s.read_ahead > 0
        assert s.read_ahead_used > 0.25 * s.misses

    def test_leave_the_running_ranges_alone(self) -> None:
        model = load(DEMO_MODEL, slots=15, ahead=Always(), routing="cache-prior")
        run_model(model, _story(), [60] + [1] * 5)
        block = model.expert_cache.look_ahead._guessers[1].block
        tokens, total = block.running_range.tokens, float(block.running_range.total)
        assert block.guess(mx.ones((1, 1, 192))) is not None
        assert (block.running_range.tokens, float(block.running_range.total)) == (tokens, total)

    def test_are_what_the_router_selects_when_it_sees_that_input(self, shelf: Shelf) -> None:
        opened = OpenedModel(shelf.checkpoint("qwen3_moe"))
        model = opened.load(MemoryOptions(slots=12), CacheOptions(routing="original"))
        block = opened.blocks[1]
        x = mx.random.normal((1, 1, model.args.hidden_size))
        guess = Guesser(1, block, model.args.hidden_size, None).guess(x)
        assert guess is not None
        logits = np.array(block.block.gate(x)).ravel()
        assert guess.experts() == np.argsort(-logits)[: block.k].tolist()

    def test_are_not_made_for_layers_that_are_all_resident_or_by_anybody_when_disabled(self) -> None:
        model = load(DEMO_MODEL, slots=60, ahead=Always())
        run_model(model, _story(), [60] + [1] * 3)
        assert model.expert_cache.stats.decode.read_ahead == 0
        model = load(DEMO_MODEL, slots=15, ahead=Always())
        model.expert_cache.look_ahead.enabled = False
        run_model(model, _story(), [60] + [1] * 3)
        assert model.expert_cache.stats.decode.read_ahead == 0


class TestChunks:
    LENGTHS = (60, 60, 1, 1)

    @pytest.mark.parametrize("flash", [None, EmulatedFlash(20e6, 1e-4)])
    @pytest.mark.parametrize("slots", [4, 6, 30, 59])
    def test_have_the_bits_and_the_counts_of_reading_nothing_ahead(
        self, slots: int, flash: EmulatedFlash | None
    ) -> None:
        tokens, runs = _story(), []
        for ahead in (None, Payoff()):  # which, for single tokens, has not begun yet
            model = load(DEMO_MODEL, slots=slots, ahead=ahead, flash=flash)
            logits, cache = run_model(model, tokens, self.LENGTHS), model.expert_cache
            figures = [getattr(cache.stats.prefill, name) for name in COUNTED]
            runs.append((logits, figures, [x.residents.eviction_order() for x in cache.layers]))
        assert same_bits(runs[1][0], runs[0][0])
        assert runs[1][1:] == runs[0][1:]
        assert cache.stats.prefill.read_ahead > 0

    @pytest.mark.parametrize("layout", ["float32", "4bit"])
    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_have_the_bits_of_stock(self, shelf: Shelf, model_type: str, layout: str) -> None:
        path = shelf.checkpoint(model_type, layout)  # type: ignore[arg-type]
        lengths = [80, 64, 1, 1]
        tokens = random_tokens(1, sum(lengths))
        model = load(path, slots=num_experts(tiny_config(model_type)) // 2, ahead=Payoff())
        assert same_bits(run_model(model, tokens, lengths), run_model(shelf.stock(path), tokens, lengths))
        assert model.expert_cache.stats.prefill.read_ahead > 0

    def test_begin_with_what_the_last_one_needed(self) -> None:
        model = load(DEMO_MODEL, slots=6, ahead=Payoff())
        tokens = mx.full((1, 120), _story()[0, 0])
        run_model(model, tokens[:, :60], [60])
        s = model.expert_cache.stats.prefill
        first = s.read_ahead_used
        assert first < s.read_ahead  # one token again and again leaves most experts alone
        before = s.read_ahead
        model.expert_cache.reset()
        run_model(model, tokens[:, :60], [60])
        s = model.expert_cache.stats.prefill
        assert s.read_ahead_used == s.read_ahead > 0
        assert s.read_ahead <= before

    def test_that_are_short_read_nothing_ahead(self) -> None:
        model = load(DEMO_MODEL, slots=6, ahead=Payoff())
        run_model(model, _story(), [59, 40, 41])
        assert model.expert_cache.stats.prefill.read_ahead == 0

    @pytest.mark.parametrize("where", ["the switch", "a read"])
    def test_that_fail_give_their_buffers_back(self, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
        tokens = _story()
        expected = run_model(load(DEMO_MODEL, slots=12, ahead=None), tokens, self.LENGTHS)
        model = load(DEMO_MODEL, slots=12, ahead=Payoff())
        cache, calls = model.expert_cache, 0

        def fail(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 12:
                raise ReadError("the disk is gone")

        if where == "a read":
            after_each_read(monkeypatch, lambda n, requests: fail())
        else:
            prepare = cache._prepare
            monkeypatch.setattr(cache, "_prepare", lambda *a: (fail(), prepare(*a))[1])
        with pytest.raises(ReadError):
            run_model(model, tokens, self.LENGTHS)
        cache.reset()
        assert same_bits(run_model(model, tokens, self.LENGTHS), expected)
        ahead = cache.look_ahead
        assert len(ahead._free) + len(ahead._staged) + len(ahead._dropped) == BUFFERS


class TestReads:
    def test_count_what_was_read_in_vain(self) -> None:
        model = load(DEMO_MODEL, slots=15, ahead=Always())
        run_model(model, _story(), [60] + [1] * 40)
        cache = model.expert_cache
        both = (cache.stats.prefill, cache.stats.decode)  # what was read in vain is counted when its buffer is needed
        wrong = sum(s.read_ahead - s.read_ahead_used for s in both)
        size = cache.layers[0].bytes_per_expert
        extra = sum(s.bytes_read - size * s.loads for s in both)
        assert 0 < extra <= size * wrong

    def test_that_fail_in_vain_are_not_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokens = _story()
        expected = run_model(load(DEMO_MODEL, slots=15, ahead=None), tokens, [60] + [1] * 20)
        model = load(DEMO_MODEL, slots=15, ahead=Always())
        start = ExpertReader.start

        def refuse(self: ExpertReader, requests: Sequence[ReadRequest], **how: Any) -> Any:
            if how.get("ahead"):
                raise ReadError("no")
            return start(self, requests, **how)

        monkeypatch.setattr(ExpertReader, "start", refuse)
        assert same_bits(run_model(model, tokens, [60] + [1] * 20), expected)
        assert model.expert_cache.stats.decode.read_ahead == 0

    def test_that_fail_and_are_needed_raise_and_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokens = _story()
        expected = run_model(load(DEMO_MODEL, slots=15, ahead=None), tokens, [60] + [1] * 20)
        model = load(DEMO_MODEL, slots=15, ahead=Always())
        cache, kv = model.expert_cache, make_prompt_cache(model)
        out, armed, caught = [model(tokens[:, :60], cache=kv)], False, 0

        def fail(n: int, requests: Sequence[ReadRequest]) -> None:
            if armed and _is_staged(cache, requests):
                scribble(requests)
                raise ReadError("the disk is gone")

        after_each_read(monkeypatch, fail)
        for i in range(60, 80):
            armed = i % 4 == 0
            try:
                logits = model(tokens[:, i : i + 1], cache=kv)
            except ReadError:
                caught += 1
                armed = False
                for layer_kv in kv:  # layers before the one that failed hold the token already
                    layer_kv.trim(layer_kv.offset - i)
                logits = model(tokens[:, i : i + 1], cache=kv)
            mx.eval(logits)
            out.append(logits)
        assert caught > 0
        assert same_bits(mx.concatenate(out, axis=1), expected)

    def test_stop_with_the_reader(self) -> None:
        model = load(DEMO_MODEL, slots=15, ahead=Always())
        run_model(model, _story(), [60] + [1] * 5)
        model.expert_cache.close()
        with pytest.raises(ReadError, match="closed"):
            run_model(model, _story()[:, 40:], [1] * 30)


class TestBuffers:
    @pytest.mark.parametrize(
        ("layers", "experts", "buffers"),
        [(3, 16, 0), (20, 24, 6), (7, 16, 2), (6, 60, 7), (32, 8, 2), (48, 128, 16), (2, 512, 16), (1, 16, 0)],
    )
    def test_take_at_most_a_fiftieth_of_the_experts_and_a_quarter_of_a_layer(
        self, layers: int, experts: int, buffers: int
    ) -> None:
        assert buffers_for([experts] * layers) == buffers

    def test_are_part_of_the_plan_and_of_the_host_buffers(self) -> None:
        opened = OpenedModel(DEMO_MODEL)
        plan = opened.plan(MemoryOptions(memory="12MB", max_context=256))
        size = buffers_for([60] * 6) * opened.blocks[0].bytes_per_expert
        assert plan.host_buffers == size
        model = opened.load(MemoryOptions(memory="12MB", max_context=256), CacheOptions())
        assert model.expert_cache.reader.host_buffer_bytes == size

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=40), st.integers(2, 4))
    def test_are_never_used_twice_at_once(self, steps: list[tuple[int, bool]], buffers: int) -> None:
        model = load(DEMO_MODEL, slots=8, ahead=Always(), buffers=buffers)
        cache = model.expert_cache
        ahead, layers = cache.look_ahead, cache.layers
        for number, uses in steps:
            guess = _Known(number + 1, [(7 * number + i) % 60 for i in range(4)])
            ahead.begin(guess, cache.stats.decode)
            held = [*ahead._staged, *ahead._dropped]
            assert len({id(s.buffer) for s in held}) == len(held)
            assert len(held) + len(ahead._free) == buffers
            layer = layers[number + 1]
            needed = [s.expert for s in ahead._staged][: layer.k] if uses else [59]
            cache.load(layer, layer.residents.plan(needed), cache.stats.decode)
            assert not ahead._staged
            for e in needed:  # the bytes are the expert's
                slot = layer.residents.slot_of(e)
                got = [bytes(layer.pool.view(c, slot)) for c in range(len(layer.extents.nbytes))]
                views = [memoryview(bytearray(n)) for n in layer.extents.nbytes]
                cache.reader.read(layer.requests(e, views))
                assert got == [bytes(v) for v in views]


class _Known:
    """A guess that needs no array."""

    def __init__(self, layer: int, experts: list[int]) -> None:
        self.layer, self._experts = layer, experts

    def experts(self) -> list[int]:
        return self._experts


def _is_staged(cache: Any, requests: Sequence[ReadRequest]) -> bool:
    """True if these bytes went to a buffer rather than into slots."""
    slots = [view.obj for x in cache.layers for view in x.pool._views]
    return bool(requests) and not any(requests[0].view.obj is s for s in slots)


def _story() -> mx.array:
    """[1, 140] tokens of text: routing of random tokens has no locality."""
    tokenizer = OpenedModel(DEMO_MODEL).tokenizer()
    text = (
        "Once upon a time there was a little girl named Lily. She had a red ball and a small dog. Every day they went "
        "to the park to play. One day the ball rolled into the water and the dog jumped after it. Lily was afraid, but "
        "the dog came back with the ball in his mouth. She was very happy and gave him a big hug. Then they went home, "
        "where her mother had made soup, and they told her all about the day."
    )
    tokens = (tokenizer.encode(text) * 3)[:140]
    return mx.array([tokens])
