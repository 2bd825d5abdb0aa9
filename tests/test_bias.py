"""The bias changes which experts a decode token uses, and nothing else: weights, prompt tokens and batches stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import numpy.typing as npt
import pytest
import reference_routing as reference
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import (
    MODEL_TYPES,
    Shelf,
    experts_per_token,
    num_experts,
    random_tokens,
    run_model,
    same_bits,
    tiny_config,
)

from mlx_moecache.generation import StepOptions, generate_step
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.moe_block import MoeBlock
from mlx_moecache.routing import CachePrior

GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
STRONG = 1.0


@dataclass
class Call:
    """One call of a switch: its input rows [T, D], selections [T, K], outputs [T, K, D], residents before it."""

    x: mx.array
    indices: mx.array
    y: mx.array
    residents: frozenset[int]


class Biased:
    """A tiny model with a strong bias and few slots, whose switches are overheard."""

    def __init__(self, shelf: Shelf, model_type: str, *, slots: int, strength: float = STRONG, **options: Any) -> None:
        changes = options.pop("changes", {})
        self.config = tiny_config(model_type, **changes)
        self.path = shelf.checkpoint(model_type, **changes)
        self.stock = shelf.stock(self.path)
        self.k = experts_per_token(self.config)
        self.top_j: int = options.get("top_j", 2 if self.k >= 4 else 1)
        opened = OpenedModel(self.path)
        self.model = opened.load(
            MemoryOptions(slots=slots), CacheOptions(routing=CachePrior(strength=strength, top_j=self.top_j))
        )
        self.cache = self.model.expert_cache
        self.blocks: list[MoeBlock] = opened.blocks
        self.calls: dict[str, list[Call]] = {b.path: [] for b in self.blocks}
        for b in self.blocks:
            self._overhear(b)

    def _overhear(self, block: MoeBlock) -> None:
        inner = block._run

        def run(x: mx.array, indices: mx.array) -> mx.array:
            residents = frozenset(block.layer.residents.experts)
            y = inner(x, indices)
            k, width = indices.shape[-1], x.shape[-1]
            call = Call(x.reshape(-1, width), indices.reshape(-1, k), y.reshape(-1, k, width), residents)
            self.calls[block.path].append(call)
            return y

        block._run = run

    def stock_block(self, block: MoeBlock) -> Any:
        return dict(self.stock.named_modules())[block.path.rpartition(".")[0]]

    def logits(self, block: MoeBlock, x: mx.array) -> npt.NDArray[np.float64]:
        """Router logits [T, E] of rows x [T, D], from the weights and nothing else."""
        upstream = self.stock_block(block)
        router = upstream.router if "router" in upstream else upstream.gate
        z = np.array(x, dtype=np.float64) @ np.array(router.weight, dtype=np.float64).T
        return z + np.array(router.bias, dtype=np.float64) if "bias" in router else z


def shared_experts(block: Any, x: mx.array) -> mx.array:
    """What a stock block adds to its routed experts, from its own modules."""
    if "shared_expert" in block:
        return mx.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
    if "shared_experts" in block:
        return block.shared_experts(x)
    return mx.zeros_like(x)


def random_rows(n: int, seed: int = 0) -> Iterator[mx.array]:
    """n single tokens [1, 1, D], of the scale that the norms before the blocks give."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        yield mx.array(rng.standard_normal((1, 1, 128)).astype(np.float32))


VARIANTS = [(t, {}) for t in MODEL_TYPES] + [
    ("deepseek_v2", GROUPS),
    ("olmoe", {"norm_topk_prob": True}),
    ("qwen3_moe", {"norm_topk_prob": False}),
]


class TestOneBlockAtDecode:
    @pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
    def test_selection_follows_cache_prior_and_weights_are_the_models_own(
        self, shelf: Shelf, model_type: str, changes: dict[str, Any]
    ) -> None:
        m = Biased(shelf, model_type, slots=experts_per_token(tiny_config(model_type)) + 1, changes=changes)
        block = m.blocks[-1]
        upstream, ranges, swapped, decided = m.stock_block(block), [], 0, 0
        for x in random_rows(40):
            out = block.block(x)
            call = m.calls[block.path][-1]
            chosen = np.array(call.indices)[0].tolist()
            z = m.logits(block, call.x)[0]
            allowed = reference.allowed_experts(z, m.config)
            ranges.append(reference.token_range(z, allowed))
            expected, lead = reference.cache_prior(
                z, m.k, call.residents, reference.inclusive_mean(ranges), STRONG, m.top_j, allowed
            )
            mean = block.running_range.total.item() / block.running_range.tokens
            assert mean == pytest.approx(reference.inclusive_mean(ranges), rel=1e-5)  # from the first token on
            if lead > 1e-4:  # otherwise rounding decides
                decided += 1
                assert set(chosen) == set(expected)
            own = sorted(allowed, key=lambda e: -z[e])[: m.k]
            swapped += len(set(chosen) - set(own))

            weights = reference.mixing_weights(model_type, z, chosen, m.config)
            routed = (np.array(call.y[0], dtype=np.float64) * weights[:, None]).sum(axis=0)
            by_hand = routed + np.array(shared_experts(upstream, x)).reshape(-1)
            np.testing.assert_allclose(np.array(out).reshape(-1), by_hand, rtol=1e-4, atol=1e-4 * np.abs(by_hand).max())

            switch = upstream.experts if model_type == "gpt_oss" else upstream.switch_mlp
            rows = call.x.reshape(1, 1, -1)
            assert same_bits(switch(rows, call.indices.reshape(1, 1, -1)).reshape(call.y.shape), call.y)
        assert decided > 35
        assert swapped > 10
        assert m.cache.stats.decode.swapped == swapped

    @pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
    @pytest.mark.parametrize("top_j", [1, 2])
    def test_the_routers_best_experts_are_always_selected(
        self, shelf: Shelf, model_type: str, changes: dict[str, Any], top_j: int
    ) -> None:
        m = Biased(
            shelf,
            model_type,
            slots=experts_per_token(tiny_config(model_type)),
            strength=50.0,
            top_j=top_j,
            changes=changes,
        )
        block = m.blocks[0]
        for x in random_rows(30, seed=1):
            block.block(x)
            call = m.calls[block.path][-1]
            z = m.logits(block, call.x)[0]
            best = sorted(reference.allowed_experts(z, m.config), key=lambda e: -z[e])[:top_j]
            assert set(best) <= set(np.array(call.indices)[0].tolist())

    @pytest.mark.parametrize("top_j", [1, 3, 4])
    def test_groups_that_the_model_ruled_out_stay_out_and_are_not_protected(self, shelf: Shelf, top_j: int) -> None:
        m = Biased(shelf, "deepseek_v2", slots=8, strength=50.0, top_j=top_j, changes=GROUPS)
        block = m.blocks[0]
        outside = 0
        for x in random_rows(60, seed=2):
            block.block(x)
            call = m.calls[block.path][-1]
            z = m.logits(block, call.x)[0]
            allowed = reference.allowed_experts(z, m.config)
            chosen = set(np.array(call.indices)[0].tolist())
            assert chosen <= set(allowed)
            assert set(sorted(allowed, key=lambda e: -z[e])[:top_j]) <= chosen
            outside += bool(call.residents - set(allowed))
        assert outside > 30  # residents of dropped groups were there to tempt

    def test_the_same_set_keeps_the_models_own_order_and_bits(self, shelf: Shelf) -> None:
        """With all but one expert resident and a small bonus, nearly no token is swapped; the others are untouched."""
        m = Biased(shelf, "qwen3_moe", slots=15, strength=0.01)
        block = m.blocks[0]
        upstream, equal = m.stock_block(block), 0
        for x in random_rows(40, seed=3):
            before = m.cache.stats.decode.swapped
            out = block.block(x)
            if m.cache.stats.decode.swapped == before:
                equal += 1
                assert same_bits(out, upstream(x))
        assert equal > 20


class TestWhatIsBiased:
    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_decode_swaps_something(self, shelf: Shelf, model_type: str) -> None:
        m = Biased(shelf, model_type, slots=experts_per_token(tiny_config(model_type)))
        steps = generate_step(random_tokens(1, 12)[0], m.model, StepOptions(max_tokens=12))
        tokens = [token for token, _ in steps]
        assert len(tokens) == 12
        assert m.cache.stats.decode.swapped > 0
        assert m.cache.stats.prefill.swapped == 0

    @pytest.mark.parametrize("length", [1, 2, 33])
    @pytest.mark.parametrize("chunk", [1, 16])
    @pytest.mark.parametrize("model_type", ["qwen2_moe", "phimoe"])
    def test_no_prompt_token_is_biased(self, shelf: Shelf, model_type: str, chunk: int, length: int) -> None:
        m = Biased(shelf, model_type, slots=experts_per_token(tiny_config(model_type)))
        prompt = random_tokens(1, length, seed=4)[0]
        kv = make_prompt_cache(m.model)
        options = StepOptions(prefill_step_size=chunk, prompt_cache=kv)
        _, logprobs = next(generate_step(prompt, m.model, options))

        lengths = [min(chunk, length - 1 - i) for i in range(0, length - 1, chunk)] + [1]
        logits = run_model(m.stock, prompt[None], lengths)[:, -1, :]
        assert same_bits(logprobs, (logits - mx.logsumexp(logits, keepdims=True)).squeeze(0))
        assert m.cache.stats.prefill.selections == length * m.k * len(m.blocks)
        assert m.cache.stats.swapped == m.cache.stats.decode.selections == 0

    def test_a_second_prompt_in_the_same_kv_cache_is_not_biased_either(self, shelf: Shelf) -> None:
        m = Biased(shelf, "olmoe", slots=4)
        kv = make_prompt_cache(m.model)
        list(generate_step(random_tokens(1, 6)[0], m.model, StepOptions(max_tokens=5, prompt_cache=kv)))
        before = m.cache.stats.copy()
        next(generate_step(random_tokens(1, 5, seed=5)[0], m.model, StepOptions(max_tokens=5, prompt_cache=kv)))
        reply = m.cache.stats - before
        assert reply.prefill.selections == 5 * m.k * len(m.blocks)
        assert reply.decode.selections == reply.swapped == 0

    def test_under_mlx_lm_one_row_is_decode_and_several_are_prefill(self, shelf: Shelf) -> None:
        m = Biased(shelf, "mixtral", slots=2)
        step = mlx_lm.generate.__globals__["generate_step"]
        prompt = random_tokens(1, 9, seed=6)[0]
        tokens = [t for t, _ in step(prompt, m.model, max_tokens=10)]
        assert len(tokens) == 10
        per_token = m.k * len(m.blocks)
        assert m.cache.stats.prefill.selections == 8 * per_token  # all but the last token of the prompt
        assert m.cache.stats.prefill.swapped == 0
        assert m.cache.stats.decode.selections == 11 * per_token  # mlx-lm looks one token ahead
        assert m.cache.stats.decode.swapped > 0

    def test_one_row_in_the_prefill_phase_is_not_biased(self, shelf: Shelf) -> None:
        m = Biased(shelf, "gpt_oss", slots=4)
        tokens = random_tokens(1, 20, seed=7)
        with m.cache.phase("prefill"):
            logits = run_model(m.model, tokens, [1] * 20)
        assert same_bits(logits, run_model(m.stock, tokens, [1] * 20))
        assert m.cache.stats.swapped == m.cache.stats.decode.selections == 0

        run_model(m.model, tokens, [1] * 20)
        assert m.cache.stats.decode.swapped > 0  # the phase has ended

    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_nothing_is_biased_if_all_experts_are_resident(self, shelf: Shelf, model_type: str) -> None:
        m = Biased(shelf, model_type, slots=num_experts(tiny_config(model_type)))
        tokens, lengths = random_tokens(1, 20, seed=8), [12] + [1] * 8
        assert same_bits(run_model(m.model, tokens, lengths), run_model(m.stock, tokens, lengths))
        assert m.cache.stats.decode.selections == 0

    def test_growing_to_all_experts_ends_the_bias_and_shrinking_brings_it_back(self, shelf: Shelf) -> None:
        m = Biased(shelf, "qwen2_moe", slots=4)
        tokens, lengths = random_tokens(1, 16, seed=9), [8] + [1] * 8
        expected = run_model(m.stock, tokens, lengths)
        assert not same_bits(run_model(m.model, tokens, lengths), expected)
        m.cache.resize(slots=16)
        assert same_bits(run_model(m.model, tokens, lengths), expected)
        m.cache.resize(slots=5)
        m.cache.reset()
        run_model(m.model, tokens, lengths)
        assert m.cache.stats.decode.swapped > 0


class TestRunningMean:
    @pytest.mark.parametrize(("model_type", "changes"), VARIANTS[:8])
    def test_it_covers_every_prompt_and_decode_token_the_first_included(
        self, shelf: Shelf, model_type: str, changes: dict[str, Any]
    ) -> None:
        m = Biased(shelf, model_type, slots=experts_per_token(tiny_config(model_type)) + 1, changes=changes)
        prompt = random_tokens(1, 41, seed=10)[0]
        for _ in generate_step(prompt, m.model, StepOptions(max_tokens=9, prefill_step_size=16)):
            pass
        for block in m.blocks:
            z = np.concatenate([m.logits(block, call.x) for call in m.calls[block.path]])
            assert len(z) == 41 + 8 == block.running_range.tokens
            ranges = [reference.token_range(row, reference.allowed_experts(row, m.config)) for row in z]
            mean = block.running_range.total.item() / block.running_range.tokens
            assert mean == pytest.approx(np.mean(ranges), rel=1e-5)

    def test_a_prompt_that_was_read_exactly_counts_when_a_bias_is_switched_on(self, shelf: Shelf) -> None:
        m, exact = Biased(shelf, "qwen2_moe", slots=5), Biased(shelf, "qwen2_moe", slots=5)
        exact.cache.set_strategy("original")
        for x in (m, exact):
            run_model(x.model, random_tokens(1, 30), [30])
        for a, b in zip(exact.blocks, m.blocks, strict=True):
            assert a.running_range.tokens == b.running_range.tokens == 30
            assert a.running_range.total.item() == b.running_range.total.item()

    @pytest.mark.parametrize("routing", ["pruning:k=2", "original", "cache-prior"])
    def test_nothing_piles_up_where_all_experts_are_resident(self, shelf: Shelf, routing: str) -> None:
        opened = OpenedModel(shelf.checkpoint("qwen2_moe"))
        model = opened.load(MemoryOptions(slots=99), CacheOptions(routing=routing))
        tokens, used = random_tokens(1, 200), []
        for _ in range(4):
            run_model(model, tokens, [200])
            gc.collect()
            mx.clear_cache()
            used.append(mx.get_active_memory())
        assert max(used[1:]) <= used[0] + 4096

    def test_reset_starts_it_again(self, shelf: Shelf) -> None:
        m = Biased(shelf, "mixtral", slots=3)
        run_model(m.model, random_tokens(1, 10), [10])
        m.cache.reset()
        assert [b.running_range.tokens for b in m.blocks] == [0, 0, 0]
        run_model(m.model, random_tokens(1, 3), [1, 2])
        assert [b.running_range.tokens for b in m.blocks] == [3, 3, 3]


class TestRecency:
    @pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral", "phimoe"])
    def test_all_tokens_count_in_their_order_and_the_best_expert_of_a_token_is_its_oldest(
        self, shelf: Shelf, model_type: str
    ) -> None:
        m = Biased(shelf, model_type, slots=num_experts(tiny_config(model_type)) // 2)
        prompt = random_tokens(1, 21, seed=11)[0]
        for _ in generate_step(prompt, m.model, StepOptions(max_tokens=9, prefill_step_size=7)):
            pass
        for block in m.blocks:
            recent: list[int] = []  # all experts, the least recently used first
            for call in m.calls[block.path]:
                for z, chosen in zip(m.logits(block, call.x), np.array(call.indices).tolist(), strict=True):
                    for e in sorted(chosen, key=lambda e: -z[e]):
                        recent = [other for other in recent if other != e] + [e]
            residents = block.layer.residents
            assert residents.eviction_order() == recent[-residents.capacity :]
