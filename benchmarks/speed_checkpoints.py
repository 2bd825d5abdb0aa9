"""Synthetic checkpoints: real layer shapes, fewer layers, weights that cost nothing to make.

Of each family the sizes that decide about speed are those of the real model: hidden and inner sizes, attention heads,
experts, experts per token, 4 bits in groups of 64. What is smaller is the number of layers, and with it the vocabulary,
so that embedding and head keep their share of a token. On MLX's CPU backend scales are float32, because its kernels are
20 to 100 times slower in bfloat16; an expert is then 5 instead of 4.5 bits per weight.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_moecache.checkpoints.skeleton import write_sparse
from mlx_moecache.errors import UsageError

GROUP = 64  # weights that share a scale and a bias
CHUNK = 2**20
NOISE = 2**23  # bytes of random weights, repeated
BYTES = {"BF16": 2, "F32": 4}
MOST_OF_DISK = 0.95

Tensors = dict[str, tuple[str, tuple[int, ...]]]

_COMMON = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "quantization": {"group_size": GROUP, "bits": 4},
}
QWEN = {  # config.json of Qwen1.5-MoE-A2.7B, as far as it says how large things are
    **_COMMON,
    "model_type": "qwen2_moe",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "vocab_size": 151936,
    "rope_theta": 1e6,
    "norm_topk_prob": False,
    "eos_token_id": 151643,
}
OLMOE = {
    **_COMMON,
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 50304,
    "rope_theta": 10000.0,
    "norm_topk_prob": False,
    "eos_token_id": 50279,
}
QWEN3 = {
    **_COMMON,
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "rope_theta": 1e6,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "eos_token_id": 151645,
}


@dataclass(frozen=True)
class Family:
    """Which model a synthetic checkpoint takes its shapes from."""

    title: str
    config: Mapping[str, Any]
    layers: int  # of the real model
    default_layers: int  # of ours


FAMILIES = {
    "qwen1.5-moe": Family("Qwen1.5-MoE-A2.7B", QWEN, 24, 3),
    "olmoe": Family("OLMoE-1B-7B", OLMOE, 16, 3),
    "qwen3-30b-a3b": Family("Qwen3-30B-A3B", QWEN3, 48, 2),
}


def cache_folder() -> Path:
    """Where checkpoints are kept unless the user names a folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mlx_moecache" / "benchmarks"


def synthetic_checkpoint(name: str, folder: Path, *, layers: int | None = None) -> Path:
    """The model folder of a family's checkpoint, made if it is not there. Raises UsageError without room for it."""
    family = FAMILIES[name]
    count = layers or family.default_layers
    dtype = "F32" if mx.default_device() == mx.cpu else "BF16"
    config = reduced(family, count)
    return made_once(folder / f"{name}-{count}-layers-{dtype.lower()}", config, dtype)


def reduced(family: Family, layers: int) -> dict[str, Any]:
    """The family's config.json with `layers` layers and the vocabulary in proportion (a multiple of 512)."""
    vocabulary = max(512, round(family.config["vocab_size"] * layers / family.layers / 512) * 512)
    return {**family.config, "num_hidden_layers": layers, "vocab_size": vocabulary, "eos_token_id": vocabulary - 1}


def made_once(target: Path, config: Mapping[str, Any], dtype: str) -> Path:
    """`target`, written completely or not at all. Raises UsageError if the disk has no room for it."""
    if (target / "config.json").exists():
        return target
    tensors = tensors_of(config, int(config["num_hidden_layers"]), dtype=dtype)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        shard = partial / "model.safetensors"
        write_sparse(shard, tensors)
        needed, free = shard.stat().st_size, shutil.disk_usage(partial).free
        if needed > MOST_OF_DISK * free:
            raise UsageError(
                f"{target} needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
                "give another --folder or fewer --layers"
            )
        fill(shard, tensors, experts=True)
        (partial / "config.json").write_text(json.dumps(config))
        os.replace(partial, target)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror or error}; give another --folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def tensors_of(config: Mapping[str, Any], layers: int, *, dtype: str = "BF16") -> Tensors:
    """Names, dtypes and shapes as mlx_lm.convert writes them. dtype: of what is not quantised."""
    D, E, vocabulary = config["hidden_size"], config["num_experts"], config["vocab_size"]
    kind = config["model_type"]
    head = config.get("head_dim") or D // config["num_attention_heads"]
    Q, KV = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    inner = config.get("moe_intermediate_size") or config["intermediate_size"]
    found: Tensors = {}

    def quantised(name: str, *shape: int) -> None:
        *outer, width = shape
        found[f"{name}.weight"] = "U32", (*outer, width // 8)
        for part in ("scales", "biases"):
            found[f"{name}.{part}"] = dtype, (*outer, width // GROUP)

    def mlp(name: str, experts: tuple[int, ...], width: int) -> None:
        quantised(f"{name}.gate_proj", *experts, width, D)
        quantised(f"{name}.up_proj", *experts, width, D)
        quantised(f"{name}.down_proj", *experts, D, width)

    quantised("model.embed_tokens", vocabulary, D)
    quantised("lm_head", vocabulary, D)
    found["model.norm.weight"] = dtype, (D,)
    for i in range(layers):
        at = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}.{norm}.weight"] = dtype, (D,)
        for part, rows, columns in (("q", Q, D), ("k", KV, D), ("v", KV, D), ("o", D, Q)):
            quantised(f"{at}.self_attn.{part}_proj", rows, columns)
            if kind == "qwen2_moe" and part != "o":
                found[f"{at}.self_attn.{part}_proj.bias"] = dtype, (rows,)
        if kind != "qwen2_moe":
            each = kind == "qwen3_moe"  # normalised for each head
            found[f"{at}.self_attn.q_norm.weight"] = dtype, (head if each else Q,)
            found[f"{at}.self_attn.k_norm.weight"] = dtype, (head if each else KV,)
        quantised(f"{at}.mlp.gate", E, D)
        if "shared_expert_intermediate_size" in config:
            quantised(f"{at}.mlp.shared_expert_gate", 1, D)
            mlp(f"{at}.mlp.shared_expert", (), config["shared_expert_intermediate_size"])
        mlp(f"{at}.mlp.switch_mlp", (E,), inner)
    return found


def fill(shard: Path, tensors: Tensors, *, experts: bool = False) -> None:
    """Values into a sparse shard. Norms are 1, token embeddings and routers random, so that tokens go different ways.

    experts: every quantised weight is random, with scales that keep the size of what is multiplied, and is really on
    disk afterwards: a hole would be read from no device.
    """
    noise = np.random.default_rng(0).integers(0, 256, NOISE if experts else CHUNK, dtype=np.uint8).tobytes()
    with shard.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name, (dtype, shape) in tensors.items():
            begin, end = (8 + size + x for x in header[name]["data_offsets"])
            pattern = _pattern(name, dtype, shape, noise, experts)
            if pattern is None:
                continue
            file.seek(begin)
            while begin < end:
                begin += file.write(pattern[: end - begin])
        if experts:
            file.flush()
            os.fsync(file.fileno())


def _pattern(name: str, dtype: str, shape: tuple[int, ...], noise: bytes, experts: bool) -> bytes | None:
    """Bytes to repeat for a tensor; None: it stays a hole."""
    if "norm" in name:
        return _constant(1.0, dtype)
    if not experts:
        if "embed_tokens" not in name and ".mlp.gate." not in name:
            return None
        if name.endswith(".scales"):
            return _constant(1 / 32, dtype)
        return noise if name.endswith(".weight") else None
    if name.endswith(".weight"):
        return noise
    # Values of 4 bits, 0 to 15, have a mean of 7.5 and a deviation of 4.6.
    width = 1 if "embed_tokens" in name else shape[-1] * GROUP
    scale = 1 / (4.6 * width**0.5)
    if name.endswith(".scales"):
        return _constant(scale, dtype)
    return _constant(-7.5 * scale, dtype) if name.endswith(".biases") else None


def _constant(value: float, dtype: str) -> bytes:
    raw = np.float32(value).tobytes()  # bfloat16 is its upper half
    return raw[4 - BYTES[dtype] :] * (CHUNK // BYTES[dtype])
