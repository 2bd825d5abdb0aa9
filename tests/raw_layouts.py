"""The inverse of mlx-lm's `sanitize` for expert tensors: how Hugging Face checkpoints of each model type name them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import mlx.core as mx

Weights = dict[str, mx.array]
Writer = Callable[[str, str, str, dict[str, mx.array]], Iterator[tuple[str, mx.array]]]

P1 = (
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "olmoe",
    "mellum",
    "hunyuan",
    "ernie4_5_moe",
    "deepseek",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "kimi_vl",
    "kimi_k25",
    "exaone_moe",
    "mimo_v2_flash",
    "bailing_moe",
    "bailing_moe_linear",
    "bailing_hybrid",
    "bailing_moe_v3",
    "longcat_flash",
    "longcat_flash_ngram",
    "laguna",
    "jamba",
    "dots1",
    "Klear",
    "afmoe",
    "solar_open",
)
P2 = (
    "mixtral",
    "phimoe",
    "minimax",
    "minimax_m3_vl",
    "lfm2_moe",
    "kimi_linear",
    "kimi_k3",
    "deepseek_v41",
)
P3 = (
    "mistral3",
    "qwen3_5_moe",
    "gemma4",
    "gemma4_text",
    "mistral4",
    "granitemoe",
    "granitemoehybrid",
)
P5 = (
    "nemotron_h",
    "phixtral",
    "step3p5",
)
IN_PLACE_RAW = (*P1, *P2, *P3, *P5)

_P2_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_BLOCKS = {"kimi_linear": "block_sparse_moe", "kimi_k3": "block_sparse_moe"}
_SWITCH = re.compile(r"(.*)\.(switch_mlp|switch_glu|experts)\.(gate_proj|up_proj|down_proj|fc1|fc2)\.(\w+)")
# How the files of these types begin where the module's path begins otherwise.
_PREFIXES = {
    "qwen3_5_moe": ("language_model.model.", "model.language_model."),
    "gemma4": ("language_model.model.", "model.language_model."),
    "mistral3": ("language_model.model.", "model.language_model."),
    "laguna": ("model.", "language_model.model."),
}


def raw_experts(model_type: str, weights: Weights) -> Weights:
    """`weights` of a model of `model_type` with its expert tensors in the published layout."""
    raw: Weights = {}
    groups: dict[tuple[str, str], dict[str, mx.array]] = {}
    for name, w in weights.items():
        match = _SWITCH.fullmatch(name)
        if match is None:
            raw[name] = w
        else:
            block, switch, projection, suffix = match.groups()
            groups.setdefault((block, f"{switch}.{suffix}"), {})[projection] = w
    for (block, rest), parts in groups.items():
        switch, suffix = rest.split(".")
        raw.update(_layout(model_type)(block, switch, suffix, parts))
    if model_type in _PREFIXES:
        ours, theirs = _PREFIXES[model_type]
        raw = {theirs + n.removeprefix(ours) if n.startswith(ours) else n: w for n, w in raw.items()}
    if model_type == "deepseek_v41":  # its published names never begin with "model."
        ends = {"lm_head.weight": "head.weight", "model.embed_tokens.weight": "embed.weight"}
        raw = {ends.get(n, n.removeprefix("model.")): w for n, w in raw.items()}
    return raw


def _layout(model_type: str) -> Writer:
    if model_type in P1:
        return _per_expert
    if model_type in P2:
        return _w123(_BLOCKS.get(model_type))
    if model_type in ("granitemoe", "granitemoehybrid"):
        return _granite
    if model_type in P3:
        return _fused
    return {"nemotron_h": _nemotron, "phixtral": _phixtral, "step3p5": _step}[model_type]


def _per_expert(block: str, switch: str, suffix: str, parts: Weights) -> Iterator[tuple[str, mx.array]]:
    for projection, w in parts.items():
        for e in range(w.shape[0]):
            yield f"{block}.experts.{e}.{projection}.{suffix}", w[e]


def _w123(other: str | None) -> Writer:
    def write(block: str, switch: str, suffix: str, parts: Weights) -> Iterator[tuple[str, mx.array]]:
        if other is not None:
            block = f"{block.rpartition('.')[0]}.{other}"
        block = block.removesuffix(".experts").replace(".mlp", ".ffn") if block.endswith(".mlp.experts") else block
        for projection, w in parts.items():
            for e in range(w.shape[0]):
                yield f"{block}.experts.{e}.{_P2_NAMES[projection]}.{suffix}", w[e]

    return write


def _fused(block: str, switch: str, suffix: str, parts: Weights) -> Iterator[tuple[str, mx.array]]:
    experts = block if block.endswith(".experts") else f"{block}.experts"
    yield f"{experts}.gate_up_proj", mx.concatenate([parts["gate_proj"], parts["up_proj"]], axis=1)
    yield f"{experts}.down_proj", parts["down_proj"]


def _granite(block: str, switch: str, suffix: str, parts: Weights) -> Iterator[tuple[str, mx.array]]:
    yield f"{block}.input_linear.weight", mx.concatenate([parts["gate_proj"], parts["up_proj"]], axis=1)
    yield f"{block}.output_linear.weight", parts["down_proj"]


def _nemotron(block: str, switch: str, suffix: str, parts: Weights) -> Iterator[tuple[str, mx.array]]:
    for ours, theirs in (("fc1", "up_proj"), ("fc2", "down_proj")):
        for e in range(parts[ours].shape[0]):
            yield f"{block}.experts.{e}.{theirs}.{suffix}", parts[ours][e]


def _phixtral(block: str, switch: str, suffix: str, parts: Weights) -> Iterator[tuple[str, mx.array]]:
    for projection, w in parts.items():
        for e in range(w.shape[0]):
            yield f"{block}.mlp.{e}.{projection}.{suffix}", w[e]


def _step(block: str, switch: str, suffix: str, parts: Weights) -> Iterator[tuple[str, mx.array]]:
    for projection, w in parts.items():
        yield f"{block.removesuffix('.mlp')}.moe.{projection}.{suffix}", w
