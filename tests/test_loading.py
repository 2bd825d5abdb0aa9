"""Opening checkpoints: memory, mixed quantisation, file layouts, and what is refused with which words."""

from __future__ import annotations

import gc
import json
import math
import os
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import olmoe, qwen2_moe
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRASwitchLinear
from mlx_lm.utils import _get_classes, load_model, quantize_model
from tiny_models import (
    Config,
    Shelf,
    build_model,
    random_tokens,
    run_model,
    same_bits,
    tiny_config,
    write_checkpoint,
    write_weights,
)

import mlx_moecache
from mlx_moecache.checkpoints.checkpoint import INDEX_NAME
from mlx_moecache.errors import (
    BudgetError,
    CheckpointError,
    HubError,
    ReadError,
    UnsupportedModelError,
    UsageError,
)
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.moe_block import find_blocks
from mlx_moecache.seam import SelectionSeam

MB = 10**6
LENGTHS = [40, 13] + [1] * 6
TOKENS = random_tokens(1, sum(LENGTHS), seed=3)
EXACT = CacheOptions(routing="original")
DENSE: Config = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 320,
    "tie_word_embeddings": False,
}


def write_big_checkpoint(folder: Path) -> Path:
    """A model with 151 MB of float32 experts, which are a hole in the file: quick to write and to read."""
    config = tiny_config("qwen2_moe", hidden_size=256, moe_intermediate_size=512, num_experts=32, num_experts_per_tok=2)
    model_class, args_class = _get_classes(config)
    shapes = {p: a.shape for p, a in tree_flatten(model_class(args_class.from_dict(config)).parameters())}
    resident = {
        p: mx.random.normal(shape, key=mx.random.key(i))
        for i, (p, shape) in enumerate(shapes.items())
        if "switch" not in p
    }
    write_weights(folder, config, resident, shards=1)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    header, end = {}, 0
    for path, shape in shapes.items():
        if "switch" in path:
            start, end = end, end + 4 * math.prod(shape)
            header[path] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    assert end > 150 * MB
    text = json.dumps(header).encode()
    with open(folder / "model-00002-of-00002.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_big_checkpoint(tmp_path_factory.mktemp("big"))


@pytest.fixture
def peak(big: Path) -> Iterator[Callable[[], int]]:
    """A function that says by how many bytes MLX's peak memory has exceeded what was in use at the start."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    yield lambda: mx.get_peak_memory() - before


class TestMemory:
    def test_experts_are_never_materialised(self, big: Path, peak: Callable[[], int]) -> None:
        opened = OpenedModel(big)
        assert peak() < 1 * MB  # nothing is read before the plan is made
        model = opened.load(MemoryOptions(slots=2, max_context=128), EXACT)
        plan, cache = model.memory_plan, model.expert_cache
        assert cache.nbytes == plan.slots == 3 * 2 * 3 * 256 * 512 * 4
        assert peak() <= plan.resident + cache.nbytes + 64 * MB
        assert peak() <= plan.resident + cache.nbytes + 2 * MB  # and in fact hardly any more than is kept

        run_model(model, random_tokens(1, 48), [40] + [1] * 8)
        assert cache.stats.prefill.bytes_read > 100 * MB  # nearly all experts went through the slots
        assert peak() <= plan.total

    def test_loading_all_experts_needs_no_second_copy(self, big: Path, peak: Callable[[], int]) -> None:
        model = OpenedModel(big).load(MemoryOptions(slots=32, max_context=128), EXACT)
        assert peak() <= model.memory_plan.resident + model.expert_cache.nbytes + 2 * MB
        model.expert_cache.resize(slots=2)
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        assert peak() <= model.memory_plan.resident + model.expert_cache.nbytes + 2 * MB  # the memory is given back

    def test_a_budget_that_is_too_small_is_refused_before_anything_is_read(
        self, big: Path, peak: Callable[[], int]
    ) -> None:
        opened = OpenedModel(big)
        with pytest.raises(BudgetError, match="smallest that works") as error:
            opened.load(MemoryOptions(memory="8MB", max_context=128), EXACT)
        assert "\n" not in str(error.value)
        assert peak() < 1 * MB

    def test_the_memory_plan_holds_while_generating(self, big: Path, peak: Callable[[], int]) -> None:
        model = OpenedModel(big).load(MemoryOptions(memory="80MB", max_context=256), EXACT)
        assert 2 < model.expert_cache.slots_per_layer[0] < 32
        chunk = model.memory_plan.prefill_step_size
        tokens = random_tokens(1, 200)
        run_model(model, tokens, [min(chunk, 192 - i) for i in range(0, 192, chunk)] + [1] * 8)
        assert peak() <= model.memory_plan.total <= 80 * MB


class TestLayouts:
    def expect_stock_logits(self, path: Path, slots: int = 5) -> OpenedModel:
        opened = OpenedModel(path)
        model = opened.load(MemoryOptions(slots=slots), EXACT)
        assert same_bits(run_model(model, TOKENS, LENGTHS), run_model(load_model(path)[0], TOKENS, LENGTHS))
        return opened

    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.parametrize("layout", ["4bit", "raw"])
    def test_one_file_or_many(self, tmp_path: Path, layout: Any, shards: int) -> None:
        path = write_checkpoint(tmp_path, tiny_config("olmoe"), layout, shards=shards)
        assert (path / "model.safetensors.index.json").exists() == (shards > 1)
        self.expect_stock_logits(path)

    def test_quantisation_that_differs_by_projection_and_by_layer(self, tmp_path: Path) -> None:
        def quantise(path: str, module: nn.Module) -> bool | dict[str, Any]:
            if "switch_mlp.down_proj" in path:
                return {"group_size": 64, "bits": 8}
            if "layers.1.mlp.switch_mlp" in path:
                return {"group_size": 32, "bits": 3}
            return "layers.2.mlp.switch_mlp.up_proj" not in path  # this one stays float32

        path = write_checkpoint(tmp_path, tiny_config("qwen2_moe"), "4bit", quantise=quantise)
        written = json.loads((path / "config.json").read_text())["quantization"]
        assert written["model.layers.1.mlp.switch_mlp.gate_proj"] == {"group_size": 32, "bits": 3}
        opened = self.expect_stock_logits(path)
        sizes = [b.bytes_per_expert for b in opened.blocks]
        assert len(set(sizes)) == 3  # so no layer may take its slots' shapes from another

    def test_different_numbers_of_slots_by_layer(self, shelf: Shelf) -> None:
        path = shelf.checkpoint("qwen3_moe", "4bit")
        model = OpenedModel(path).load(MemoryOptions(slots=4), EXACT)
        model.expert_cache.resize(slots=[4, 16, 9])
        assert same_bits(run_model(model, TOKENS, LENGTHS), run_model(shelf.stock(path), TOKENS, LENGTHS))

    def test_experts_with_biases(self, tmp_path: Path) -> None:
        self.expect_stock_logits(write_checkpoint(tmp_path, tiny_config("olmoe", mlp_bias=True), "4bit"))

    @pytest.mark.parametrize("scale", [2, 30])
    def test_chunks_that_are_computed_in_several_parts(
        self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, scale: int
    ) -> None:
        monkeypatch.setattr("mlx_moecache.cached_switch.WAVE_ROWS", scale)
        self.expect_stock_logits(shelf.checkpoint("mixtral"), slots=3)


class TestLoad:
    def test_gives_model_and_tokenizer_with_the_options_of_its_arguments(self, shelf: Shelf) -> None:
        path = shelf.checkpoint("qwen2_moe", "4bit")
        model, tokenizer = mlx_moecache.load(str(path), slots=5, strength=0.25, top_j=1, eviction="lfu")
        cache = model.expert_cache
        assert cache.slots_per_layer == [5, 5, 5]
        assert (cache.strategy.name, cache.strategy.strength, cache.strategy.top_j) == ("cache-prior", 0.25, 1)
        assert cache.layers[0].residents.eviction == "lfu"
        assert tokenizer.encode("ab") == tokenizer.encode("a") + tokenizer.encode("b")

    def test_without_memory_and_slots_a_small_model_is_wholly_resident(self, shelf: Shelf) -> None:
        model, _ = mlx_moecache.load(str(shelf.checkpoint("mixtral")))
        assert not model.expert_cache.has_host_reads

    def test_memory_and_slots_together_are_refused(self, shelf: Shelf) -> None:
        with pytest.raises(UsageError, match="either memory or slots, not both"):
            mlx_moecache.load(str(shelf.checkpoint("mixtral")), memory="1GB", slots=4)

    @pytest.mark.parametrize(
        ("arguments", "error", "said"),
        [
            ({"slots": 3}, BudgetError, "--slots 4 or more"),
            ({"slots": 0}, BudgetError, "--slots 4 or more"),
            ({"memory": "1KB"}, BudgetError, "smallest that works"),
            ({"memory": "lots"}, UsageError, "not a memory size"),
            ({"slots": 5, "max_context": 0}, UsageError, "at least 1 token"),
            ({"slots": 5, "routing": "belady"}, UsageError, "unknown routing"),
            ({"slots": 5, "top_j": 9}, UsageError, "at most the model's 4 experts"),
            ({"slots": 5, "eviction": "fifo"}, UsageError, "unknown eviction policy"),
        ],
    )
    def test_values_that_are_not_allowed(
        self, shelf: Shelf, arguments: dict[str, Any], error: type[Exception], said: str
    ) -> None:
        with pytest.raises(error) as raised:
            mlx_moecache.load(str(shelf.checkpoint("qwen2_moe")), **arguments)
        assert said in str(raised.value) and "\n" not in str(raised.value)

    def test_random_numbers_go_on_as_after_loading_with_mlx_lm(self, shelf: Shelf) -> None:
        path = shelf.checkpoint("mixtral")
        mx.random.seed(5)
        load_model(path)
        expected = mx.random.uniform(shape=(4,)).tolist()
        mx.random.seed(5)
        mlx_moecache.load(str(path), slots=3)
        assert mx.random.uniform(shape=(4,)).tolist() == expected


class TestRefusedCheckpoints:
    def refuse(self, path: Path, error: type[Exception], *said: str) -> None:
        with pytest.raises(error) as raised:
            OpenedModel(path)
        message = str(raised.value)
        assert type(raised.value) is error and "\n" not in message and len(message) < 700
        assert all(words in message for words in said)

    def test_a_dense_model(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path, DENSE)
        self.refuse(path, UnsupportedModelError, "no routed experts", "mlx_lm.generate")

    def test_a_model_type_that_mlx_lm_does_not_know(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path, DENSE)
        (path / "config.json").write_text(json.dumps({**DENSE, "model_type": "no_such_type"}))
        self.refuse(path, UnsupportedModelError, "no_such_type not supported", "upgrade mlx-lm")

    @pytest.mark.parametrize("key", ["num_experts", "hidden_size", "moe_intermediate_size", "model_type"])
    def test_a_config_without_a_needed_key(self, tmp_path: Path, key: str) -> None:
        path = write_checkpoint(tmp_path, tiny_config("qwen2_moe"))
        config = json.loads((path / "config.json").read_text())
        del config[key]
        (path / "config.json").write_text(json.dumps(config))
        self.refuse(path, CheckpointError, str(path), key)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null"])
    def test_a_config_that_is_no_json_object(self, tmp_path: Path, text: str) -> None:
        path = write_checkpoint(tmp_path, tiny_config("qwen2_moe"))
        (path / "config.json").write_text(text)
        self.refuse(path, CheckpointError, str(path))

    def test_no_config_at_all(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path, tiny_config("qwen2_moe"))
        (path / "config.json").unlink()
        self.refuse(path, CheckpointError, "config.json")

    def test_a_config_of_other_sizes_than_the_weights(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path, tiny_config("qwen2_moe"))
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "num_experts": 20}))
        self.refuse(path, CheckpointError, "do not fit its config.json")

    @pytest.mark.parametrize(
        "missing",
        ["model.norm.weight", "model.layers.1.mlp.gate.weight", "model.layers.2.mlp.switch_mlp.up_proj.weight"],
    )
    def test_missing_weights(self, tmp_path: Path, missing: str) -> None:
        config = tiny_config("qwen2_moe")
        weights = dict(tree_flatten(build_model(config).parameters()))
        del weights[missing]
        self.refuse(write_weights(tmp_path, config, weights), CheckpointError, missing)

    def test_missing_raw_experts(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path, tiny_config("mixtral"), "raw", shards=1)
        weights = mx.load(str(path / "model.safetensors"))
        weights.pop("model.layers.1.block_sparse_moe.experts.5.w2.weight")
        mx.eval(weights)  # they are still to be read from the file that is overwritten
        mx.save_safetensors(str(path / "model.safetensors"), weights)
        self.refuse(path, CheckpointError, "layers.1.block_sparse_moe.experts.5.w2")

    def test_a_missing_shard(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path, tiny_config("mixtral"))
        (path / "model-00002-of-00002.safetensors").unlink()
        self.refuse(path, CheckpointError, "model-00002-of-00002.safetensors", "missing")

    def test_needed_weights_in_a_shard_that_mlx_lm_does_not_load(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path, tiny_config("mixtral"))
        (path / "model-00002-of-00002.safetensors").rename(path / "second.safetensors")
        index = (path / INDEX_NAME).read_text().replace("model-00002-of-00002", "second")
        (path / INDEX_NAME).write_text(index)
        self.refuse(path, CheckpointError, "do not fit its config.json", "'second.safetensors'", "would not find")

    def test_custom_model_code_without_permission(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path, tiny_config("mixtral", model_file="model.py"))
        self.refuse(path, UsageError, "--trust-remote-code")

    def test_half_precision_experts_that_the_cpu_backend_cannot_compute(self, tmp_path: Path) -> None:
        config = tiny_config("mixtral")
        weights = {p: a.astype(mx.bfloat16) for p, a in tree_flatten(build_model(config).parameters())}
        self.refuse(write_weights(tmp_path, config, weights), UnsupportedModelError, "bfloat16", "mlx_lm.convert")

    def test_global_scales_that_the_cpu_backend_cannot_compute(self, tmp_path: Path) -> None:
        config = tiny_config("qwen3_moe")
        model, config = quantize_model(build_model(config), config, 16, 4, "nvfp4", global_scale=True)
        path = write_weights(tmp_path, config, dict(tree_flatten(model.parameters())))
        self.refuse(path, UnsupportedModelError, "global scales", "_proj.global_scale", "only on a GPU")

    def test_a_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        with pytest.raises(HubError):
            mlx_moecache.load(str(tmp_path / "nowhere"))

    def test_an_extra_end_token_that_the_tokenizer_does_not_have(self, shelf: Shelf) -> None:
        opened = OpenedModel(shelf.checkpoint("mixtral"))
        with pytest.raises(UsageError, match="cannot end at this token") as error:
            opened.tokenizer(extra_eos_tokens=("<no-such-token>",))
        assert "\n" not in str(error.value)
        tokenizer = opened.tokenizer(extra_eos_tokens=("a",))
        assert set(tokenizer.encode("a")) < set(tokenizer.eos_token_ids)

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path, tiny_config("mixtral"))
        with pytest.raises(CheckpointError, match="no usable tokenizer") as error:
            mlx_moecache.load(str(path), slots=2)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("projection", ["gate_proj", "down_proj"])
    def test_adapters_on_expert_layers(self, projection: str) -> None:
        model = build_model(tiny_config("mixtral"))
        switch = model.layers[1].block_sparse_moe.switch_mlp
        assert isinstance(switch[projection], SwitchLinear)
        switch[projection] = LoRASwitchLinear.from_base(switch[projection])
        with pytest.raises(UnsupportedModelError) as error:
            find_blocks(model)
        message = str(error.value)
        assert f"layers.1.block_sparse_moe.switch_mlp.{projection}" in message and "mlx_lm.fuse" in message


class TestFoldersThatMlxLmLoads:
    """What mlx-lm does not mind is no reason to refuse a model."""

    @pytest.mark.parametrize("index", ["side file", "old shard names", "tensor in no file", "no tensors", "no JSON"])
    def test_whatever_the_index_says(self, tmp_path: Path, index: str) -> None:
        path = write_checkpoint(tmp_path, tiny_config("qwen3_moe"))
        weight_map = json.loads((path / INDEX_NAME).read_text())["weight_map"]
        if index == "side file":
            mx.save_safetensors(str(path / "mtp.safetensors"), {"mtp.fc.weight": mx.zeros((4, 4))})
            weight_map["mtp.fc.weight"] = "mtp.safetensors"
        elif index == "old shard names":
            weight_map = {name: shard.replace("00002.", "00005.") for name, shard in weight_map.items()}
        elif index == "tensor in no file":
            weight_map["model.layers.0.self_attn.rotary_emb.inv_freq"] = next(iter(weight_map.values()))
        else:
            weight_map = {}
        text = "" if index == "no JSON" else json.dumps({"weight_map": weight_map})
        (path / INDEX_NAME).write_text(text)
        self.same_as_stock(path, load_model(path)[0])

    @pytest.mark.parametrize("name", ["q [4bit]", "what?", "all*"])
    def test_a_path_that_mlx_lm_would_take_as_a_pattern(self, tmp_path: Path, name: str) -> None:
        path = write_checkpoint(tmp_path / "plain", tiny_config("qwen2_moe"), tokenizer=True)
        stock = load_model(path)[0]
        path = path.rename(tmp_path / name)
        self.same_as_stock(path, stock)
        assert OpenedModel(path).tokenizer().encode("fox")

    def same_as_stock(self, path: Path, stock: nn.Module) -> None:
        model = OpenedModel(path).load(MemoryOptions(slots=8), EXACT)
        assert same_bits(run_model(model, TOKENS, LENGTHS), run_model(stock, TOKENS, LENGTHS))


class TestReadingResidentWeights:
    def test_a_shard_that_became_shorter_is_a_read_error_that_names_the_folder(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path, tiny_config("qwen2_moe"), shards=1)
        opened = OpenedModel(path)
        os.truncate(path / "model.safetensors", (path / "model.safetensors").stat().st_size // 4)
        with pytest.raises(ReadError) as error:
            opened.load(MemoryOptions(slots=4), EXACT)
        message = str(error.value)
        assert str(path) in message and "Unable to read" in message and "\n" not in message

    def test_other_errors_stay_what_they_are(self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*arrays: Any) -> None:
            raise RuntimeError("[malloc] Unable to allocate 5 bytes.")

        opened = OpenedModel(shelf.checkpoint("qwen2_moe"))
        monkeypatch.setattr(mx, "eval", fail)
        with pytest.raises(RuntimeError, match="allocate"):
            opened.load(MemoryOptions(slots=4), EXACT)


class TestRoutersThatTheSeamDoesNotReach:
    def expect_exact_only(self, shelf: Shelf, model_type: str, said: str) -> None:
        path = shelf.checkpoint(model_type)
        with pytest.raises(UnsupportedModelError) as error:
            OpenedModel(path).load(MemoryOptions(slots=5), CacheOptions(routing="cache-prior"))
        message = str(error.value)
        assert "cannot be biased" in message and said in message and "--exact" in message and "\n" not in message
        model = OpenedModel(path).load(MemoryOptions(slots=5), EXACT)
        assert same_bits(run_model(model, TOKENS, LENGTHS), run_model(load_model(path)[0], TOKENS, LENGTHS))
        assert model.expert_cache.stats.decode.misses > 0

    def test_a_router_without_argpartition(self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
        def call(self: Any, x: mx.array) -> mx.array:
            p = mx.softmax(self.gate(x), axis=-1)
            indices = mx.argsort(-p, axis=-1)[..., : self.top_k]
            y = self.switch_mlp(x, indices)
            return (y * mx.take_along_axis(p, indices, axis=-1)[..., None]).sum(axis=-2)

        monkeypatch.setattr(qwen2_moe.Qwen2MoeSparseMoeBlock, "__call__", call)
        self.expect_exact_only(shelf, "qwen2_moe", "does not select with argpartition")

    def test_a_router_that_selects_twice(self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
        def call(self: Any, x: mx.array) -> mx.array:
            p = mx.softmax(self.gate(x), axis=-1)
            mx.argpartition(p, kth=-2, axis=-1)
            indices = mx.argpartition(-p, kth=self.top_k - 1, axis=-1)[..., : self.top_k]
            y = self.switch_mlp(x, indices)
            return (y * mx.take_along_axis(p, indices, axis=-1)[..., None]).sum(axis=-2)

        monkeypatch.setattr(qwen2_moe.Qwen2MoeSparseMoeBlock, "__call__", with_globals_of_module(call, qwen2_moe))
        self.expect_exact_only(shelf, "qwen2_moe", "seen 2 times instead of once")

    @pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v2", "qwen3_moe", "gpt_oss"])
    def test_a_clone_that_selects_other_experts(
        self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, model_type: str
    ) -> None:
        inner = SelectionSeam.argpartition

        def wrong(self: SelectionSeam, a: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            return (inner(self, a, *args, **kwargs) + 1) % a.shape[-1]

        monkeypatch.setattr(SelectionSeam, "argpartition", wrong)
        self.expect_exact_only(shelf, model_type, "gives other results than the original")

    def test_a_clone_that_mixes_differently(self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
        inner = SelectionSeam.softmax
        monkeypatch.setattr(SelectionSeam, "softmax", lambda self, x, *a, **k: inner(self, 0.9 * x, *a, **k))
        self.expect_exact_only(shelf, "olmoe", "gives other results than the original")

    def test_one_bad_layer_is_enough(self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
        upstream, built = olmoe.OlmoeSparseMoeBlock.__init__, []

        class Other(olmoe.OlmoeSparseMoeBlock):
            def __call__(self, x: mx.array) -> mx.array:
                return self.shared(x)

            def shared(self, x: mx.array) -> mx.array:
                return olmoe.OlmoeSparseMoeBlock.__call__(self, x)

        def init(self: Any, args: Any) -> None:
            upstream(self, args)
            built.append(self)
            if len(built) % 3 == 0:
                self.__class__ = Other

        monkeypatch.setattr(olmoe.OlmoeSparseMoeBlock, "__init__", init)
        self.expect_exact_only(shelf, "olmoe", "model.layers.2.mlp.switch_mlp")


def with_globals_of_module(function: Any, module: Any) -> Any:
    """`function` as if it stood in `module`."""
    return types.FunctionType(function.__code__, vars(module), function.__name__)
