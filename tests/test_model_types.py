"""Every routed-expert model type of mlx-lm that has a tiny configuration: exact without the bias, honest with it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from raw_layouts import IN_PLACE_RAW, raw_experts
from tiny_models import (
    ALL_TYPES,
    Shelf,
    model_weights,
    random_tokens,
    run_model,
    same_bits,
    tiny_config,
    write_weights,
)

from mlx_moecache.architectures import find
from mlx_moecache.errors import UnsupportedModelError
from mlx_moecache.expert_cache import ExpertCache
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.routing import CachePrior, Strategy
from mlx_moecache.seam import SelectionSeam

# Chunks of 32 tokens have at least 64 indices where k > 1, which the switch sorts; then decode.
LENGTHS = [32, 32, 11] + [1] * 16
TOKENS = random_tokens(1, sum(LENGTHS))
STREAMED = [t for t in ALL_TYPES if t != "dbrx"]
# Routers whose computation depends on the config: (model type, changes, ranks by logits).
VARIANTS: list[tuple[str, dict[str, Any], bool]] = [
    ("bailing_moe", {"score_function": "sigmoid"}, False),
    ("bailing_moe", {"score_function": "sigmoid", "n_group": 4, "topk_group": 2}, False),
    (
        "bailing_moe",
        {"score_function": "sigmoid", "n_group": 4, "topk_group": 2, "moe_router_enable_expert_bias": True},
        False,
    ),
    ("bailing_moe", {"n_group": 4, "topk_group": 2}, True),
    ("ernie4_5_moe", {"moe_gate_act": "sigmoid"}, False),
    ("lfm2_moe", {"use_expert_bias": False}, False),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}, True),
]


def load(folder: Path, routing: str | Strategy = "original") -> nn.Module:
    """The model with the fewest slots that work."""
    opened = OpenedModel(folder)
    return opened.load(MemoryOptions(slots=max(b.k for b in opened.blocks)), CacheOptions(routing=routing))


def cache_of(model: nn.Module) -> ExpertCache:
    cache = model.expert_cache
    assert isinstance(cache, ExpertCache)
    return cache


class TestExactStreaming:
    @pytest.mark.parametrize("model_type", STREAMED)
    def test_minimum_slots_give_stock_logits(self, shelf: Shelf, model_type: str) -> None:
        folder = shelf.saved(model_type)
        model = load(folder)
        assert same_bits(run_model(model, TOKENS, LENGTHS), run_model(shelf.stock(folder), TOKENS, LENGTHS))
        stats = cache_of(model).stats
        assert stats.swapped == 0 and stats.prefill.loads > 0 and stats.decode.misses > 0
        assert all(x.residents.capacity == x.k < x.num_experts for x in cache_of(model).layers)

    @pytest.mark.parametrize("model_type", IN_PLACE_RAW)
    def test_published_layout_is_read_in_place(self, tmp_path: Path, shelf: Shelf, model_type: str) -> None:
        config = tiny_config(model_type)
        weights = model_weights(config)
        raw = raw_experts(model_type, weights)
        assert set(raw) != set(weights)
        write_weights(tmp_path / "raw", config, raw)
        lengths = [32, 11] + [1] * 4
        tokens = TOKENS[:, : sum(lengths)]
        expected = run_model(shelf.stock(tmp_path / "raw"), tokens, lengths)
        model = load(tmp_path / "raw")
        assert same_bits(run_model(model, tokens, lengths), expected)
        assert cache_of(model).stats.decode.misses > 0

    def test_dbrx_is_refused_with_the_reason(self, shelf: Shelf) -> None:
        with pytest.raises(UnsupportedModelError, match=r"separate modules .*mlx_lm\.generate"):
            OpenedModel(shelf.saved("dbrx"))

    @pytest.mark.parametrize("model_type", ["llama4", "qwen3_vl_moe"])
    def test_a_transposed_layout_is_refused_with_the_convert_command(self, tmp_path: Path, model_type: str) -> None:
        config = tiny_config(model_type)
        raw = {}
        for name, w in model_weights(config).items():
            if ".down_proj.weight" in name and w.ndim == 3:
                block = name.partition(".experts." if model_type == "llama4" else ".switch_mlp.")[0]
                gate, up = (model_weights(config)[name.replace("down_proj", p)] for p in ("gate_proj", "up_proj"))
                raw[f"{block}.experts.gate_up_proj"] = mx.concatenate([gate, up], axis=1).swapaxes(1, 2)
                raw[f"{block}.experts.down_proj"] = w.swapaxes(1, 2)
            elif w.ndim != 3:
                raw[name] = w
        write_weights(tmp_path / "raw", config, raw)
        with pytest.raises(UnsupportedModelError, match=rf"mlx_lm\.convert --hf-path {tmp_path}/raw"):
            OpenedModel(tmp_path / "raw")


class Selection:
    """One final selection: c [rows, E] (larger is better) and the selected [rows, k], in the order of the model."""

    def __init__(self, c: mx.array, ids: mx.array) -> None:
        self.c, self.ids = c, ids


@contextmanager
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Selection]]:
    """Selections that seams of models loaded inside make. Seams bind the method when they are installed."""
    selections: list[Selection] = []
    original = SelectionSeam.argpartition

    def argpartition(seam: SelectionSeam, a: mx.array, kth: int = 0, axis: int | None = -1, **rest: Any) -> mx.array:
        before = seam.selections
        chosen = original(seam, a, kth, axis, **rest)
        if seam.selections > before:
            k = kth + 1 if kth >= 0 else -kth
            ids = chosen[..., :k] if kth >= 0 else chosen[..., -k:]
            selections.append(Selection(-a if kth >= 0 else a, ids))
        return chosen

    with monkeypatch.context() as patch:
        patch.setattr(SelectionSeam, "argpartition", argpartition)
        yield selections


class Forced:
    """Stands in for `mx` in mlx-lm's model files: the final selections are those given, all else is MLX."""

    def __init__(self, selections: list[Selection]) -> None:
        self.left = list(selections)

    def argpartition(self, a: mx.array, kth: int = 0, axis: int = -1, **rest: Any) -> mx.array:
        if self.left and axis % a.ndim == a.ndim - 1 and a.shape == self.left[0].c.shape:
            return self.left.pop(0).ids
        return mx.argpartition(a, kth, axis=axis, **rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)


def model_modules() -> list[ModuleType]:
    names = [m.name for m in pkgutil.iter_modules(mlx_lm.models.__path__)]
    return [importlib.import_module(f"mlx_lm.models.{n}") for n in names if find(n) is not None]


class TestBiasedRouting:
    @pytest.mark.parametrize(
        ("model_type", "changes"),
        [(t, {}) for t in STREAMED if t != "phimoe"] + [(t, changes) for t, changes, _ in VARIANTS],
    )
    def test_weights_are_what_the_model_gives_the_selected_experts(
        self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, model_type: str, changes: dict[str, Any]
    ) -> None:
        """Stock mlx-lm, with only its final argpartition replaced by our choice, computes the same logits."""
        architecture = find(model_type)
        assert architecture is not None
        folder, prompt, steps = shelf.saved(model_type, **changes), TOKENS[:, :21], TOKENS[:, 21:33]
        grouped = architecture.groups or "n_group" in changes
        with recording(monkeypatch) as seen:
            top_j = 0 if architecture.family == "top-1" else 1
            model = load(folder, CachePrior(strength=1.0, top_j=top_j))
            kv = make_prompt_cache(model)
            mx.eval(model(prompt, cache=kv))
            seen.clear()
            ours = mx.concatenate([model(steps[:, i : i + 1], cache=kv) for i in range(steps.shape[1])], axis=1)
            mx.eval(ours)
        cache = cache_of(model)
        assert len(seen) == len(cache.layers) * steps.shape[1]  # one selection per MoE layer and token
        assert cache.stats.decode.swapped > 0
        for selection in seen:
            c, ids = np.array(selection.c.astype(mx.float32)), np.array(selection.ids)
            assert len(set(ids.ravel().tolist())) == ids.size
            chosen = np.take_along_axis(c, ids, axis=-1)
            assert np.isfinite(chosen).all()
            assert not grouped or (chosen != 0).all()  # nothing from a group that was ruled out
            if top_j:
                assert c.argmax() in ids

        stock = shelf.stock(folder)
        kv = make_prompt_cache(stock)
        mx.eval(stock(prompt, cache=kv))
        forced = Forced(seen)
        mx.disable_compile()  # functions that were traced before would not look their globals up again
        try:
            with monkeypatch.context() as patch:
                for module in model_modules():
                    if getattr(module, "mx", None) is mx:
                        patch.setattr(module, "mx", forced)
                expected = [stock(steps[:, i : i + 1], cache=kv) for i in range(steps.shape[1])]
                mx.eval(expected)
        finally:
            mx.enable_compile()
        assert not forced.left
        assert same_bits(ours, mx.concatenate(expected, axis=1))

    @pytest.mark.parametrize(
        ("model_type", "changes", "by_logits"), [(t, {}, None) for t in STREAMED if t != "bailing_moe"] + VARIANTS
    )
    def test_ranking_quantity_is_that_of_the_family(
        self,
        shelf: Shelf,
        monkeypatch: pytest.MonkeyPatch,
        model_type: str,
        changes: dict[str, Any],
        by_logits: bool | None,
    ) -> None:
        """Logits for routers that rank by a monotone function of them, scores where a correction bias intervenes."""
        domains = []
        observe = SelectionSeam._observe

        def spy(seam: SelectionSeam, z: mx.array, k: int, in_logits: bool, own: mx.array) -> Any:
            domains.append(in_logits)
            return observe(seam, z, k, in_logits, own)

        model = load(shelf.saved(model_type, **changes), CachePrior(strength=0.1, top_j=0))
        monkeypatch.setattr(SelectionSeam, "_observe", spy)
        mx.eval(model(TOKENS[:, :1]))
        architecture = find(model_type)
        assert architecture is not None
        assert set(domains) == {architecture.family != "corrected" if by_logits is None else by_logits}
