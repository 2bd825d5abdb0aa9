"""The selection seam by itself: which code it reaches, what it leaves alone, and how often the host is asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference_routing as reference
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.deepseek_v3 import MoEGate
from mlx_lm.models.gpt_oss import MLPBlock
from tiny_models import MODEL_TYPES, Shelf, build_model, num_experts, random_tokens, run_model, same_bits, tiny_config

from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.moe_block import find_blocks
from mlx_moecache.routing import CachePrior
from mlx_moecache.seam import CORRECTION_BIASES, SelectionSeam, find_owner

D, E, K = 16, 8, 3


class FusedRouter(nn.Module):
    """Selects without any call that the seam knows."""

    def __call__(self, x: mx.array) -> mx.array:
        return mx.argsort(x, axis=-1)[..., -K:]


class GroupRouter(nn.Module):
    """Softmax, dropped groups at -inf in the logits, and the best of the rest, in the style of several models."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(D, E, bias=False)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        z = self.proj(x)
        groups = mx.unflatten(z, -1, (4, 2))
        worst = mx.argpartition(groups.max(axis=-1, keepdims=True), kth=1, axis=-2)[..., :2, :]
        z = mx.flatten(mx.put_along_axis(groups, worst, mx.array(-mx.inf), axis=-2), -2, -1)
        indices = mx.argpartition(z, kth=-K, axis=-1)[..., -K:]
        return indices, mx.softmax(mx.take_along_axis(z, indices, axis=-1), axis=-1)


def seam_on(owner: nn.Module, residents: list[int], strength: float, top_j: int) -> SelectionSeam:
    """An enabled seam with a fixed set of residents."""
    mask = np.zeros(E, dtype=np.float32)
    mask[residents] = 1
    seam = SelectionSeam(owner, E)
    seam.enabled, seam.strategy = True, CachePrior(strength, top_j)
    seam.bias_mask = lambda rows: mx.array(mask)
    return seam


def rows(n: int, seed: int = 0, scale: float = 3.0) -> mx.array:
    return mx.array(scale * np.random.default_rng(seed).standard_normal((n, 1, 1, D)).astype(np.float32))


class TestWhereItIsInstalled:
    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_the_owner_is_the_module_whose_code_selects(self, model_type: str) -> None:
        block = find_blocks(build_model(tiny_config(model_type)))[0]
        assert block.seam is not None
        assert block.seam.owner is (block.block.gate if model_type == "deepseek_v2" else block.block)

    def test_a_router_without_a_known_selection_has_no_owner(self) -> None:
        assert find_owner(FusedRouter(), None) is None

    def test_other_instances_and_the_type_of_the_owner_stay(self) -> None:
        config = tiny_config("gpt_oss")
        model, other = build_model(config), build_model(config)
        block = find_blocks(model)[0]
        owner, untouched = block.block, other.model.layers[0].mlp
        assert isinstance(owner, MLPBlock) and type(owner) is not MLPBlock
        assert type(untouched) is MLPBlock
        assert block.seam is not None
        block.seam.enabled, block.seam.selections = True, 0
        untouched(mx.zeros((1, 1, 128)))
        assert block.seam.selections == 0

    def test_parameters_have_the_same_names_as_before(self, shelf: Shelf) -> None:
        path = shelf.checkpoint("qwen2_moe")
        names = [n for n, _ in tree_flatten(shelf.stock(path).parameters())]
        model = OpenedModel(path).load(MemoryOptions(slots=5), CacheOptions())
        assert [n for n, _ in tree_flatten(model.parameters())] == names


class TestRoutersWithCorrectionBias:
    """deepseek_v3: sigmoid, selection by the corrected score, weights from the uncorrected, all inside mx.compile."""

    def gate(self, n_group: int = 1, topk_group: int = 1) -> MoEGate:
        config = SimpleNamespace(
            num_experts_per_tok=K,
            norm_topk_prob=True,
            n_routed_experts=E,
            routed_scaling_factor=2.5,
            n_group=n_group,
            topk_group=topk_group,
            hidden_size=D,
            topk_method="noaux_tc",
        )
        gate, rng = MoEGate(config), np.random.default_rng(5)
        gate.weight = mx.array(rng.standard_normal((E, D)).astype(np.float32) / 4)
        gate.e_score_correction_bias = mx.array(rng.uniform(0, 0.3, E).astype(np.float32))
        return gate

    @pytest.mark.parametrize("strength", [0.3, 1.0])
    def test_the_bonus_goes_to_the_corrected_score_and_never_into_a_weight(self, strength: float) -> None:
        gate, residents = self.gate(), [1, 4, 6]
        weight, correction = np.array(gate.weight, dtype=float), np.array(gate.e_score_correction_bias, dtype=float)
        seam, ranges, swapped = seam_on(gate, residents, strength, 1), [], 0
        for x in rows(40):
            s = 1 / (1 + np.exp(-weight @ np.array(x, dtype=float).reshape(-1)))
            c = s + correction
            ranges.append(reference.token_range(c, range(E)))
            expected, lead = reference.cache_prior(c, K, residents, np.mean(ranges), strength, 1, range(E))
            indices, weights = gate(x)
            chosen = np.array(indices).reshape(-1).tolist()
            if lead > 1e-5:
                assert set(chosen) == set(expected)
            swapped += len(set(chosen) - set(reference.order(c)[:K]))
            np.testing.assert_allclose(np.array(weights).reshape(-1), 2.5 * s[chosen] / s[chosen].sum(), rtol=1e-5)
        assert swapped > 5 and seam.selections == 40

    def test_dropped_groups_stay_out_and_do_not_use_up_protection(self) -> None:
        gate, residents = self.gate(n_group=4, topk_group=2), [0, 1, 2, 3, 4]
        plain = self.gate(n_group=4, topk_group=2)
        weight, correction = np.array(gate.weight, dtype=float), np.array(gate.e_score_correction_bias, dtype=float)
        seam_on(gate, residents, 50.0, 2)
        tempted = 0
        for x in rows(40, seed=1):
            c = 1 / (1 + np.exp(-weight @ np.array(x, dtype=float).reshape(-1))) + correction
            groups = sorted(range(4), key=lambda g: -(c[2 * g] + c[2 * g + 1]))[:2]
            allowed = [e for g in groups for e in (2 * g, 2 * g + 1)]
            chosen = set(np.array(gate(x)[0]).reshape(-1).tolist())
            assert chosen <= set(allowed)
            assert set(sorted(allowed, key=lambda e: -c[e])[:2]) <= chosen
            assert set(np.array(plain(x)[0]).reshape(-1).tolist()) <= set(allowed)
            tempted += bool(set(residents) - set(allowed))
        assert tempted > 20

    def test_several_rows_without_bias_are_bit_equal_to_the_compiled_original(self) -> None:
        gate, plain = self.gate(4, 2), self.gate(4, 2)
        seam = seam_on(gate, [], 1.0, 2)
        seam.bias_mask = lambda count: None
        x = rows(20, seed=2).reshape(1, 20, D)
        (a, b), (c, d) = gate(x), plain(x)
        assert np.array_equal(np.array(a), np.array(c)) and same_bits(b, d)


ALL_BIASED = ("cache-prior:strength=1", "price:delta=0.2", "mass-budget:delta=0.2", "bounded-regret:epsilon=0.2")


class TestAConstantInTheCorrectionBias:
    """Published models have biases of 7 to 35 that differ by some hundredths; only the differences mean something."""

    @pytest.mark.parametrize("routing", [*ALL_BIASED, "max-rank:m=8", "cumsum:p=0.9", "pruning:k=1"])
    @pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe", "minimax", "longcat_flash"])
    def test_changes_no_selection_of_any_strategy(self, shelf: Shelf, model_type: str, routing: str) -> None:
        folder = shelf.checkpoint(model_type)
        runs = []
        for constant in (0.0, 8.0):
            opened = OpenedModel(folder)
            slots = max(x.k for x in opened.layer_shapes) + 1
            model = opened.load(MemoryOptions(slots=slots), CacheOptions(routing=routing))
            for layer in model.expert_cache.layers:
                name = next(n for n in CORRECTION_BIASES if n in layer.seam.owner)
                layer.seam.owner[name] = layer.seam.owner[name] + constant
            kv = make_prompt_cache(model)
            logits = [model(random_tokens(1, 1, seed=i), cache=kv) for i in range(12)]
            stats = model.expert_cache.stats.decode
            runs.append((np.array(mx.concatenate(logits, axis=1)), stats.swapped, stats.loads))
            model.expert_cache.close()
        (want, swapped, loads), (got, swapped_too, loads_too) = runs
        assert (swapped_too, loads_too) == (swapped, loads)
        assert swapped > 0 or routing == "pruning:k=1"
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


class TestGroupsDroppedInTheLogits:
    def test_they_are_not_selected_and_the_range_is_that_of_the_survivors(self) -> None:
        router, residents = GroupRouter(), [0, 2, 4, 6]
        weight = np.array(router.proj.weight, dtype=float)
        seam, ranges = seam_on(router, residents, 1.0, 1), []
        for x in rows(30, seed=3):
            z = weight @ np.array(x, dtype=float).reshape(-1)
            allowed = reference.allowed_experts(
                z, {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
            )
            ranges.append(reference.token_range(z, allowed))
            expected, lead = reference.cache_prior(z, K, residents, np.mean(ranges), 1.0, 1, allowed)
            indices, weights = router(x)
            chosen = np.array(indices).reshape(-1).tolist()
            if lead > 1e-5:
                assert set(chosen) == set(expected)
            np.testing.assert_allclose(np.array(weights).reshape(-1), reference.softmax(z[chosen]), rtol=1e-4)
            mean = seam.range.total.item() / seam.range.tokens
            assert mean == pytest.approx(np.mean(ranges), rel=1e-4)


class CountedEvals:
    """Counts calls of mx.eval."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, inner = 0, mx.eval

        def counted(*arrays: Any) -> None:
            self.count += 1
            inner(*arrays)

        monkeypatch.setattr(mx, "eval", counted)


class TestHostReads:
    def decode_evals(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch, steps: int) -> list[int]:
        """mx.eval calls inside each of `steps` forward passes of one token."""
        tokens, kv, counts = random_tokens(1, steps, seed=4), make_prompt_cache(model), []
        with monkeypatch.context() as patch:
            evals = CountedEvals(patch)
            for i in range(steps):
                evals.count = 0
                logits = model(tokens[:, i : i + 1], cache=kv)
                counts.append(evals.count)
                np.array(logits)  # evaluates without mx.eval
        return counts

    @pytest.mark.parametrize("routing", ["original", "cache-prior"])
    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_one_per_layer_and_token_if_nothing_has_to_be_read(
        self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, model_type: str, routing: str
    ) -> None:
        E = num_experts(tiny_config(model_type))
        model = OpenedModel(shelf.checkpoint(model_type)).load(
            MemoryOptions(slots=E - 1), CacheOptions(routing=routing)
        )
        run_model(model, random_tokens(1, 60, seed=5), [60])  # fills the slots
        cache = model.expert_cache
        before = cache.stats.copy()
        counts = self.decode_evals(model, monkeypatch, 8)
        loads = (cache.stats - before).decode.loads
        layers = len(cache.layers)
        assert min(counts) == layers
        # A miss may fence the slots once more, which waits for nothing that is not computed anyway.
        assert sum(counts) <= 8 * layers + loads

    def test_none_for_a_layer_whose_experts_are_all_resident(
        self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = OpenedModel(shelf.checkpoint("qwen2_moe")).load(MemoryOptions(slots=16), CacheOptions())
        assert self.decode_evals(model, monkeypatch, 5) == [0] * 5
        model.expert_cache.resize(slots=[16, 15, 16])
        run_model(model, random_tokens(1, 60, seed=5), [60])
        assert min(self.decode_evals(model, monkeypatch, 8)) == 1
