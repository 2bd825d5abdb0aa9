"""What a model needs beside its experts, against what its own caches and tensors turn out to have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import MODEL_TYPES, Shelf, build_model, tiny_config, write_checkpoint

from mlx_moecache import footprint, system
from mlx_moecache.budget import CHUNKS, ForwardShape
from mlx_moecache.footprint import KVOptions, estimate, forward_shape, kv_cache_bytes, resident_bytes
from mlx_moecache.loading import MemoryOptions, OpenedModel
from mlx_moecache.moe_block import find_blocks

STEP = 256  # tokens by which a KV cache grows


def kv_bytes_of_a_run(model: nn.Module, prompt: int, reply: int, chunk: int, options: KVOptions) -> int:
    """The most bytes of KV cache while a prompt and a reply pass. Shapes only: nothing is evaluated."""
    cache = make_prompt_cache(model, max_kv_size=options.max_size)
    most = 0
    lengths = [chunk] * ((prompt - 1) // chunk) + [(prompt - 1) % chunk] + [1] * reply
    for n in filter(None, lengths):
        model(mx.zeros((1, n), dtype=mx.int32), cache=cache)
        before = [c.nbytes for c in cache]
        maybe_quantize_kv_cache(cache, options.quantized_start, options.group_size, options.bits)
        after = [c.nbytes for c in cache]
        most = max(most, sum(after) + (sum(before) if before != after else 0))
        for c in cache:
            if n == 1:
                mx.eval(c.state)  # else the graph grows with every token
    return most


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {t: build_model(tiny_config(t, num_hidden_layers=3)) for t in ("qwen2_moe", "deepseek_v2", "gpt_oss")}


class TestKVCacheBytes:
    @pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v2", "gpt_oss"])
    @pytest.mark.parametrize(
        ("prompt", "reply", "chunk"), [(20, 8, 32), (300, 8, 64), (511, 4, 512), (530, 4, 256), (600, 8, 2048)]
    )
    def test_exactly_what_a_run_in_such_chunks_has(
        self, models: dict[str, nn.Module], model_type: str, prompt: int, reply: int, chunk: int
    ) -> None:
        model, options = models[model_type], KVOptions()
        seen = kv_bytes_of_a_run(model, prompt, reply, chunk, options)
        planned = kv_cache_bytes(model, prompt + reply, options, chunk).total
        # Sliding windows: the last chunk of a run may be shorter than the one that was planned for.
        slack = 0 if model_type != "gpt_oss" else seen - seen // 2
        assert seen <= planned <= seen + slack

    @pytest.mark.parametrize("chunk", [100, 300, 77])
    @pytest.mark.parametrize("prompt", [301, 450, 700])
    def test_chunks_that_end_inside_of_a_buffer_cost_at_most_another_step(
        self, models: dict[str, nn.Module], prompt: int, chunk: int
    ) -> None:
        model, options = models["qwen2_moe"], KVOptions()
        per_token = kv_cache_bytes(model, STEP, options, STEP).total // STEP
        seen = kv_bytes_of_a_run(model, prompt, 4, chunk, options)
        planned = kv_cache_bytes(model, prompt + 4, options, chunk).total
        assert seen <= planned <= seen + 2 * STEP * per_token

    @pytest.mark.parametrize("start", [0, 200, 450])
    @pytest.mark.parametrize("chunk", [64, 256])
    def test_quantising_needs_the_old_buffers_until_the_new_ones_are_made(
        self, models: dict[str, nn.Module], start: int, chunk: int
    ) -> None:
        model, options = models["qwen2_moe"], KVOptions(bits=8, group_size=32, quantized_start=start)
        seen = kv_bytes_of_a_run(model, 400, 60, chunk, options)
        planned = kv_cache_bytes(model, 460, options, chunk).total
        assert seen <= planned <= 1.6 * seen

    def test_a_rotating_cache_keeps_its_window_and_a_chunk(self, models: dict[str, nn.Module]) -> None:
        model, options = models["qwen2_moe"], KVOptions(max_size=128)
        per_token = kv_cache_bytes(model, STEP, KVOptions(), STEP).total // STEP
        for chunk in (32, 64, 256):
            seen = kv_bytes_of_a_run(model, 600, 4, chunk, options)
            planned = kv_cache_bytes(model, 604, options, chunk).total
            assert seen <= planned <= (128 + chunk) * per_token

    @pytest.mark.parametrize("chunk", [32, 256])
    def test_a_rotating_cache_that_is_not_full_makes_room_in_steps(
        self, models: dict[str, nn.Module], chunk: int
    ) -> None:
        model, options = models["qwen2_moe"], KVOptions(max_size=512)
        seen = kv_bytes_of_a_run(model, 300, 4, chunk, options)
        planned = kv_cache_bytes(model, 304, options, chunk).total
        assert seen <= planned <= 1.1 * seen

    def test_plain_caches_grow_between_passes_and_rotating_ones_inside(self, models: dict[str, nn.Module]) -> None:
        plain = kv_cache_bytes(models["qwen2_moe"], 300, KVOptions(), 64)
        assert plain.inside == 0
        assert plain.buffer * 2 * 3 == plain.total  # keys and values of three layers
        mixed = kv_cache_bytes(models["gpt_oss"], 2048, KVOptions(), 64)
        assert 0.8 * mixed.total < 2 * mixed.buffer < mixed.total  # one of three layers has no window
        assert 0 < mixed.inside < mixed.buffer

    @pytest.mark.parametrize("bits", [4, 8])
    def test_of_a_quantised_cache_numbers_scales_and_biases_grow_together(
        self, models: dict[str, nn.Module], bits: int
    ) -> None:
        options = KVOptions(bits=bits, group_size=32, quantized_start=0)
        total, inside, buffer = kv_cache_bytes(models["qwen2_moe"], 4096, options, 64)
        assert inside == 0
        assert buffer * 2 * 3 == total  # keys and values of three layers


class TestResidentBytes:
    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_all_tensors_of_the_file_but_the_experts(self, model_type: str, shelf: Shelf) -> None:
        path = shelf.checkpoint(model_type)
        weights: dict[str, mx.array] = {}
        for shard in sorted(path.glob("*.safetensors")):
            weights.update(mx.load(str(shard)))
        experts = (".switch_mlp.", ".mlp.experts.")
        expected = sum(w.nbytes for name, w in weights.items() if not any(e in name for e in experts))
        opened = OpenedModel(path)
        tables = resident_bytes(opened.model) - expected  # rotary frequencies are not in the file
        assert 0 <= tables < 10_000

    def test_shared_tensors_count_once(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one = mx.zeros((100, 10))
                self.two = self.one
                self._private = {"table": [mx.zeros((7,))]}

        assert resident_bytes(Tied()) == 4 * (1000 + 7)


class TestPlanning:
    def test_reads_no_weight_and_computes_nothing(self, tmp_path: Path) -> None:
        config = tiny_config("qwen2_moe", vocab_size=20_000)
        path = write_checkpoint(tmp_path / "model", config)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        opened = OpenedModel(path)
        plan = opened.plan(MemoryOptions(memory="1GB"))
        assert plan.resident > 20_000_000
        assert mx.get_peak_memory() - before < 100_000


def shape_of(
    like: str, *, context: int = 1000, quantized_kv: bool = False, as_type: str | None = None, **changes: Any
) -> ForwardShape:
    config = {**tiny_config(like, **changes), "model_type": as_type or like}
    model = build_model(config)
    blocks = find_blocks(model)
    model(mx.zeros((1, 1), dtype=mx.int32), cache=make_prompt_cache(model))  # shows each block its k
    return forward_shape(model, config, blocks, context=context, kv_copy=0, quantized_kv=quantized_kv)


def scores_per_key(model_type: str, **changes: Any) -> float:
    """Bytes of attention per token that grow with each key of the context, a byte of the mask aside."""
    short, long = (shape_of(model_type, context=n, **changes) for n in (1000, 3000))
    return (long.attention - short.attention) / 2000 - 1


class TestForwardShape:
    def test_on_the_cpu_each_head_makes_its_scores_once(self) -> None:
        assert scores_per_key("qwen2_moe") == 4 * 4
        assert scores_per_key("qwen2_moe", num_attention_heads=8, num_key_value_heads=2) == 8 * 4
        assert scores_per_key("deepseek_v2") == 4 * 4

    def test_attention_sinks_are_joined_to_the_scores_and_cut_off(self) -> None:
        assert scores_per_key("gpt_oss") == 3 * 4 * 4

    @pytest.mark.parametrize(
        ("model_type", "changes", "fused"),
        [
            ("qwen3_moe", {"head_dim": 128}, True),
            ("qwen3_moe", {"head_dim": 32}, False),
            ("gpt_oss", {"head_dim": 64}, True),
            ("deepseek_v2", {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}, False),
            ("qwen2_moe", {"hidden_size": 256}, True),  # 64 per head, which the config does not say
        ],
    )
    def test_metal_fuses_heads_of_some_sizes(
        self, model_type: str, changes: dict[str, Any], fused: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(system, "on_cpu", lambda: False)
        assert (scores_per_key(model_type, **changes) == 0) == fused

    def test_attention_over_a_quantised_kv_cache_is_never_fused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(system, "on_cpu", lambda: False)
        assert scores_per_key("qwen3_moe", head_dim=128, quantized_kv=True) == 4 * 4

    def test_absorbed_latent_attention_expands_its_keys(self) -> None:
        v3 = {"as_type": "deepseek_v3", "topk_method": "noaux_tc", "norm_topk_prob": True}
        short, long = (shape_of("deepseek_v2", context=n, **v3) for n in (1000, 3000))
        assert (long.attention_fixed - short.attention_fixed) == 2000 * 4 * 4 * (16 + 32)
        assert scores_per_key("deepseek_v2", **v3) == 2 * 4 * 4

    @pytest.mark.parametrize("index_heads", [4, 8])
    def test_sparse_attention_scores_the_keys_once_more_to_pick_some(self, index_heads: int) -> None:
        dense, picking = (
            scores_per_key("glm_moe_dsa", index_n_heads=index_heads, index_topk=topk) for topk in (4000, 64)
        )
        # The scores of all heads and their sum, in float32; the order of the keys; two masks.
        assert picking - dense == 4 * (index_heads + 1) + 4 + 2

    def test_an_indexer_that_would_pick_all_keys_computes_no_queries(self) -> None:
        few, many = (shape_of("deepseek_v32", index_n_heads=n) for n in (4, 64))
        assert few.attention == many.attention
        sparse = shape_of("deepseek_v32", index_n_heads=4, index_topk=64)
        assert sparse.attention > few.attention + 2 * 4 * 4 * 128  # 4 heads of 128, and their rotation

    def test_chunked_attention_makes_its_mask_in_parts(self) -> None:
        assert scores_per_key("llama4") == 4 * 4 + 6

    @pytest.mark.parametrize("model_type", ["qwen3_next", "kimi_linear"])
    def test_a_delta_rule_without_kernel_keeps_a_state_for_each_token(
        self, model_type: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        on_cpu = shape_of(model_type, context=100)
        monkeypatch.setattr(system, "on_cpu", lambda: False)
        with_kernel = shape_of(model_type, context=100)
        assert on_cpu.attention - with_kernel.attention > 4 * 4 * 32 * 32 - 100 * 4 * 4 * 3  # 4 heads of 32 x 32
        assert (on_cpu.attention_fixed > 0) and with_kernel.attention_fixed < on_cpu.attention_fixed

    def test_linear_attention_without_decay_has_no_kernel_anywhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(system, "on_cpu", lambda: False)
        assert shape_of("bailing_moe_linear", context=100).attention_fixed >= 6 * 4 * 4 * 32 * 32

    def test_hyper_connections_hold_a_residual_of_several_streams(self) -> None:
        one, four = (shape_of("deepseek_v41", hc_mult=n) for n in (1, 4))
        assert four.held - one.held == 2 * 3 * 128 * 4  # float32, two arrays, three streams more

    def test_each_convolution_keeps_its_input_until_the_chunk_ends(self) -> None:
        few, many = (shape_of("qwen3_next", num_hidden_layers=n) for n in (3, 9))
        assert many.held - few.held == 4 * 4 * (2 * 64 + 128)  # 4 more layers without attention, of so many channels

    def test_wider_experts_cost_more_per_pair_and_more_of_them_more_per_token(self) -> None:
        narrow, wide = shape_of("qwen2_moe"), shape_of("qwen2_moe", moe_intermediate_size=128)
        assert wide.pair - narrow.pair == 4 * 3 * 64
        few, many = shape_of("olmoe", num_experts_per_tok=2), shape_of("olmoe", num_experts_per_tok=8)
        assert many.outputs == 4 * few.outputs == 4 * 8 * 128

    def test_a_large_vocabulary_counts_at_decode_only(self) -> None:
        small, large = shape_of("qwen2_moe"), shape_of("qwen2_moe", vocab_size=50_320)
        assert large.decode - small.decode == 50_000 * 4 * footprint.SAMPLING_ROWS
        assert large.attention == small.attention

    def test_dense_layers_before_the_experts_are_seen(self) -> None:
        assert (
            shape_of("deepseek_v2", intermediate_size=4096).combine - shape_of("deepseek_v2").combine
            == 2 * (4096 - 256) * 4
        )


class TestEstimate:
    def test_sliding_windows_grow_with_the_chunk_and_that_is_part_of_the_chunk(self) -> None:
        config = tiny_config("gpt_oss")
        model = build_model(config)
        blocks = find_blocks(model)
        kv, forward = estimate(model, config, blocks, KVOptions(), context=4096, chunk=None)
        longest = kv_cache_bytes(model, 4096, KVOptions(), CHUNKS[0]).total
        assert kv < longest <= kv + CHUNKS[0] * forward.held
        fixed, forward_fixed = estimate(model, config, blocks, KVOptions(), context=4096, chunk=512)
        assert fixed == kv_cache_bytes(model, 4096, KVOptions(), 512).total
        assert forward_fixed.held < forward.held

    def test_a_cache_that_never_grows_is_never_copied(self) -> None:
        config = tiny_config("qwen2_moe")
        model = build_model(config)
        blocks = find_blocks(model)
        _, short = estimate(model, config, blocks, KVOptions(), context=200, chunk=None)
        _, long = estimate(model, config, blocks, KVOptions(), context=2000, chunk=None)
        assert short.kv_buffer == 0
        assert long.kv_buffer == 64 * 4 * (2048 - 256)  # the old buffer of keys or of values
        assert short.attention_fixed == long.attention_fixed == 0
