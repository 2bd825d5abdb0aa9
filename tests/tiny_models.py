"""Tiny random checkpoints of real mlx-lm architectures, in the layouts that users have.

`build_model` makes a model with fixed random weights whose routers have a wide range of scores (else all experts tie);
`write_checkpoint` writes it as config.json, shards, index and, if wanted, a byte-level tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes, load_model, quantize_model, save_config, save_model

Layout = Literal["float32", "4bit", "mxfp4", "raw"]  # raw: float32 in the Hugging Face layout
Config = dict[str, Any]
Weights = dict[str, mx.array]

MODEL_TYPES = ("qwen2_moe", "mixtral", "deepseek_v2", "phimoe", "qwen3_moe", "olmoe", "gpt_oss")
IN_PLACE_RAW = tuple(t for t in MODEL_TYPES if t != "gpt_oss")  # raw Hugging Face layouts that are read in place
ROUTER_SCALE = 4.0
ROUTER_WEIGHT = re.compile(r"\.(gate|router|classifier)(\.(wg|layer|proj|gate|gate_proj))?\.weight$")
EOS = 256  # the bytes are tokens 0 to 255

_CONFIGS: dict[str, Config] = json.loads((Path(__file__).parent / "tiny_moe_configs.json").read_text())
_P2_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


ALL_TYPES = tuple(sorted(_CONFIGS))


def tiny_config(model_type: str, **changes: Any) -> Config:
    """A config.json of `model_type`; `changes` replace keys."""
    return {**_CONFIGS[model_type], "model_type": model_type, "eos_token_id": EOS, **changes}


def num_experts(config: Mapping[str, Any]) -> int:
    return int(next(config[n] for n in ("num_experts", "num_local_experts", "n_routed_experts") if n in config))


def experts_per_token(config: Mapping[str, Any]) -> int:
    return int(config["num_experts_per_tok"])


def build_model(config: Config, seed: int = 0) -> nn.Module:
    """The architecture of `config` in float32, every parameter random."""
    model_class, args_class = _get_classes(config)
    model: nn.Module = model_class(args_class.from_dict(config))
    rng = np.random.default_rng(seed)
    weights = []
    for path, shape in sorted((p, a.shape) for p, a in tree_flatten(model.parameters())):
        values = rng.standard_normal(shape)
        if len(shape) > 1:
            scale = 1.0 if "embed_tokens" in path else shape[-1] ** -0.5
            scale *= ROUTER_SCALE if ROUTER_WEIGHT.search(path) else 1.0
            values *= scale
        else:
            # Larger correction biases would select the same experts for nearly every token.
            values = values * (0.01 if path.endswith("correction_bias") else 0.1)
            values += 1.0 if path.endswith("norm.weight") else 0.0
        weights.append((path, mx.array(values.astype(np.float32))))
    model.update(tree_unflatten(weights))
    model.eval()
    return model


def model_weights(config: Config, seed: int = 0) -> Weights:
    """The parameters of `build_model` by name."""
    return dict(tree_flatten(build_model(config, seed).parameters()))


def write_checkpoint(
    folder: Path,
    config: Config,
    layout: Layout = "float32",
    *,
    shards: int = 2,
    seed: int = 0,
    tokenizer: bool = False,
    quantise: Callable[[str, nn.Module], bool | dict[str, Any]] | None = None,
) -> Path:
    """Write a model of `config` into `folder` and return it. `quantise` replaces mlx-lm's predicate."""
    model = build_model(config, seed)
    if layout in ("4bit", "mxfp4"):
        mode = "affine" if layout == "4bit" else layout
        model, config = quantize_model(model, config, 32, 4, mode, quant_predicate=quantise)
    weights: Weights = dict(tree_flatten(model.parameters()))
    if layout == "raw":
        if config["model_type"] == "gpt_oss":
            weights, config = _raw_gpt_oss(weights, config)
        else:
            weights = _raw(weights)
    return write_weights(folder, config, weights, shards=shards, tokenizer=tokenizer)


def write_weights(folder: Path, config: Config, weights: Weights, *, shards: int = 2, tokenizer: bool = False) -> Path:
    """Write tensors in turn to `shards` files (1: a single file without index), so that experts lie scattered."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        weight_map = {name: files[i % shards] for i, name in enumerate(names)}
        index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for i, file in enumerate(files):
        part = {name: weights[name] for name in names[i::shards]}
        mx.save_safetensors(str(folder / file), part, metadata={"format": "mlx"})
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A tokenizer without merges: one token per byte, and an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    assert tokenizer.token_to_id("<|end|>") == EOS
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _raw(weights: Weights) -> Weights:
    """The inverse of mlx-lm's `sanitize`: one tensor per expert, under the names of the Hugging Face checkpoints."""
    raw: Weights = {}
    for name, w in weights.items():
        match = re.fullmatch(r"(.*)\.switch_mlp\.(\w+)\.weight", name)
        if match is None:
            raw[name] = w
            continue
        block, projection = match.groups()
        if block.endswith("block_sparse_moe"):
            projection = _P2_NAMES[projection]
        for e in range(w.shape[0]):
            raw[f"{block}.experts.{e}.{projection}.weight"] = w[e]
    return raw


def _raw_gpt_oss(weights: Weights, config: Config) -> tuple[Weights, Config]:
    """mxfp4 blocks with gate and up rows interleaved, as the published gpt-oss files have them."""
    raw: Weights = {}
    for name, w in weights.items():
        match = re.fullmatch(r"(.*\.experts)\.(up_proj|down_proj|gate_proj)\.(weight|bias)", name)
        if match is None:
            raw[name] = w
            continue
        experts, projection, kind = match.groups()
        if projection == "up_proj":
            continue  # written together with gate_proj
        fused = "down_proj" if projection == "down_proj" else "gate_up_proj"
        if projection == "gate_proj":
            up = weights[f"{experts}.up_proj.{kind}"]
            w = mx.stack([w, up], axis=2).reshape(w.shape[0], -1, *w.shape[2:])
        if kind == "bias":
            raw[f"{experts}.{fused}_bias"] = w
            continue
        blocks, scales = mx.quantize(w, group_size=32, bits=4, mode="mxfp4")
        raw[f"{experts}.{fused}_blocks"] = blocks.view(mx.uint8).reshape(*scales.shape, 16)
        raw[f"{experts}.{fused}_scales"] = scales
    return raw, {**config, "quantization_config": {"quant_method": "mxfp4"}}


class Shelf:
    """Checkpoints and stock models of one test session, each made once. `folder` is where they are written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths: dict[str, Path] = {}
        self._stock: dict[Path, nn.Module] = {}

    def checkpoint(self, model_type: str, layout: Layout = "float32", **changes: Any) -> Path:
        """The folder of a tiny model with a byte-level tokenizer; `changes` replace keys of its config."""
        key = "-".join([model_type, layout, *(f"{name}={value}" for name, value in sorted(changes.items()))])
        if key not in self._paths:
            config = tiny_config(model_type, **changes)
            self._paths[key] = write_checkpoint(self.folder / key, config, layout, tokenizer=True)
        return self._paths[key]

    def saved(self, model_type: str, **changes: Any) -> Path:
        """A float32 model without tokenizer, saved by mlx-lm itself; `changes` replace keys of its config."""
        path = self.folder / "-".join([model_type, "saved", *(f"{k}={v}" for k, v in sorted(changes.items()))])
        if not path.exists():
            path.mkdir()
            config = tiny_config(model_type, **changes)
            save_model(path, build_model(config), donate_model=True)
            save_config(config, path / "config.json")
        return path

    def stock(self, path: Path) -> nn.Module:
        """The model in `path` as mlx-lm loads it. Do not change it: it is shared."""
        if path not in self._stock:
            self._stock[path] = load_model(path)[0]
        return self._stock[path]


def run_model(model: nn.Module, tokens: mx.array, lengths: Sequence[int]) -> mx.array:
    """Logits [B, L, V] of `tokens` [B, L], fed in chunks of `lengths` through a new KV cache, each evaluated."""
    cache = make_prompt_cache(model)
    parts, start = [], 0
    for n in lengths:
        parts.append(model(tokens[:, start : start + n], cache=cache))
        mx.eval(parts[-1])
        start += n
    return mx.concatenate(parts, axis=1)


def same_bits(a: mx.array, b: mx.array) -> bool:
    """True if two float32 arrays are equal bit for bit, and finite."""
    x, y = np.array(a), np.array(b)
    return bool(np.isfinite(x).all()) and x.dtype == y.dtype == np.float32 and x.tobytes() == y.tobytes()


def decode_figures(model: nn.Module, counted: Sequence[str]) -> list[Any]:
    """What two ways of running must agree on: counters of decode, residents in their order, and D of every layer."""
    cache = model.expert_cache
    counts = [getattr(cache.stats.decode, name) for name in counted]
    return [counts, cache.contents().experts, [float(x.range.total) for x in cache.layers]]


def random_tokens(rows: int, length: int, seed: int = 0, vocabulary: int = 320) -> mx.array:
    """Token ids [rows, length]."""
    return mx.array(np.random.default_rng(seed).integers(0, vocabulary, (rows, length), dtype=np.uint32))
