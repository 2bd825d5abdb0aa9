"""What is known of each routed-expert model type of mlx-lm: router family, raw layouts, peculiarities.

Plain data for `info`, the README's table and the guard against upstream change. Loading does not consult it: a type
that is not listed is opened all the same if its experts are mlx-lm switch layers, and its routers are tested at load.

Symbols, all [.., E]: g = router logits; s = the router's activation of g (sigmoid, softmax or sqrt(softplus)); b =
learned correction bias per expert; z = what cache-conditional routing ranks by; p = the router's probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A kind of router. `z` and `p` in symbols; `weights` says from what the mixing weights are made, never biased."""

    name: str
    title: str
    z: str
    p: str
    weights: str


@dataclass(frozen=True)
class RawLayout:
    """How a Hugging Face checkpoint that was not converted holds the experts of a layer."""

    name: str
    description: str
    in_place: bool  # each expert's bytes lie together, in the order that the switch needs


@dataclass(frozen=True)
class Architecture:
    """One model type, that is: one module of mlx_lm.models.

    `raw` names layouts of `RAW_LAYOUTS`; mlx's own stacked layout is always readable. `groups`: the router can rule out
    whole groups of experts first, and these are never chosen for being cached. `bias` is False where cache-conditional
    routing cannot act. `sometimes` marks types that are dense unless their config says otherwise.
    """

    model_type: str
    family: str
    raw: tuple[str, ...] = ()
    groups: bool = False
    bias: bool = True
    sometimes: bool = False
    since: str = ""  # first mlx-lm version that has it, if that is not the oldest supported one
    note: str = ""

    @property
    def fused_halves(self) -> bool:
        """True if the model's code cuts fused [E, 2I, D] tensors in halves, gate first."""
        return "fused halves" in self.raw

    @property
    def raw_in_place(self) -> tuple[str, ...]:
        """The raw layouts that are read without conversion."""
        return tuple(name for name in self.raw if RAW_LAYOUTS[name].in_place)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("softmax", "softmax over all experts", "g", "softmax(g)", "p of the selected"),
        Family("corrected", "score with correction bias", "s + b", "max(z, 0) / sum", "s of the selected, without b"),
        Family("logits", "selection on logits", "g", "softmax(g)", "softmax over the selected g"),
        Family("sparsemixer", "sparsemixer", "g", "softmax(g)", "softmax over the band around each selected g"),
        Family("top-1", "top-1", "g", "softmax(g)", "sigmoid(g) of the selected, times the expert's input"),
    )
}

RAW_LAYOUTS: dict[str, RawLayout] = {
    layout.name: layout
    for layout in (
        RawLayout("per expert", "`experts.{e}.gate_proj`, `up_proj`, `down_proj`", True),
        RawLayout("w1 w2 w3", "`experts.{e}.w1`, `w2`, `w3`", True),
        RawLayout("fc1 fc2", "two matrices per expert, under the model's own names", True),
        RawLayout("renamed", "stacked by expert, under the model's own names", True),
        RawLayout("fused halves", "gate and up fused, `[E, 2I, D]`", True),
        RawLayout("transposed", "gate and up fused and transposed, `[E, D, 2I]`", False),
        RawLayout("interleaved", "rows of gate and up alternate", False),
        RawLayout("packed", "a packing that mlx-lm undoes (fp8 blocks, int4, fp4)", False),
    )
}

_PER_EXPERT, _W123, _FC12, _RENAMED = ("per expert",), ("w1 w2 w3",), ("fc1 fc2",), ("renamed",)
_FUSED, _TRANSPOSED, _INTERLEAVED, _PACKED = ("fused halves",), ("transposed",), ("interleaved",), ("packed",)

_ARCHITECTURES = (
    # family "softmax"
    Architecture("deepseek", "softmax", _PER_EXPERT),
    Architecture("deepseek_v2", "softmax", _PER_EXPERT, groups=True),
    Architecture(
        "ernie4_5_moe", "softmax", _PER_EXPERT, note="sigmoid if the config says so; its correction bias is unused"
    ),
    Architecture("hunyuan", "softmax", _PER_EXPERT, note="k may differ by layer"),
    Architecture("mellum", "softmax", _PER_EXPERT),
    Architecture(
        "mistral3",
        "softmax",
        _PER_EXPERT + _FUSED + _PACKED,
        groups=True,
        sometimes=True,
        note="routed if its text model is mistral4",
    ),
    Architecture("mistral4", "softmax", _PER_EXPERT + _FUSED + _PACKED, groups=True),
    Architecture("olmoe", "softmax", _PER_EXPERT),
    Architecture("prism_hadamard_qwen35", "softmax", sometimes=True, since="0.32.1"),
    Architecture("qwen2_moe", "softmax", _PER_EXPERT),
    Architecture("qwen3_5", "softmax", sometimes=True),
    Architecture("qwen3_5_moe", "softmax", _FUSED),
    Architecture("qwen3_moe", "softmax", _PER_EXPERT),
    Architecture("qwen3_next", "softmax", _PER_EXPERT),
    Architecture("qwen3_vl_moe", "softmax", _TRANSPOSED),
    # family "corrected"
    Architecture("Klear", "corrected", _PER_EXPERT),
    Architecture("afmoe", "corrected", _PER_EXPERT, groups=True),
    Architecture("bailing_hybrid", "corrected", _PER_EXPERT, groups=True),
    Architecture("bailing_moe", "corrected", _PER_EXPERT, groups=True, note="softmax if the config has no expert bias"),
    Architecture(
        "bailing_moe_linear", "corrected", _PER_EXPERT, groups=True, note="softmax if the config has no expert bias"
    ),
    Architecture("bailing_moe_v3", "corrected", _PER_EXPERT, groups=True),
    Architecture("deepseek_v3", "corrected", _PER_EXPERT + _PACKED, groups=True),
    Architecture("deepseek_v32", "corrected", _PER_EXPERT + _PACKED, groups=True),
    Architecture("deepseek_v41", "corrected", _W123 + _PACKED, note="logits are divided by a temperature first"),
    Architecture("dots1", "corrected", _PER_EXPERT, groups=True),
    Architecture("exaone_moe", "corrected", _PER_EXPERT, groups=True),
    Architecture("glm4_moe", "corrected", _PER_EXPERT, groups=True),
    Architecture("glm4_moe_lite", "corrected", _PER_EXPERT, groups=True),
    Architecture("glm_moe_dsa", "corrected", _PER_EXPERT + _PACKED, groups=True),
    Architecture("kimi_k25", "corrected", _PER_EXPERT + _PACKED, groups=True),
    Architecture("kimi_k3", "corrected", _W123 + _PACKED, groups=True),
    Architecture("kimi_linear", "corrected", _W123, groups=True),
    Architecture("kimi_vl", "corrected", _PER_EXPERT, groups=True),
    Architecture("laguna", "corrected", _PER_EXPERT),
    Architecture("lfm2_moe", "corrected", _W123, note="sigmoid alone if the config has no expert bias"),
    Architecture(
        "longcat_flash", "corrected", _PER_EXPERT, note="identity experts have no weights and count as resident"
    ),
    Architecture(
        "longcat_flash_ngram", "corrected", _PER_EXPERT, note="identity experts have no weights and count as resident"
    ),
    Architecture("mimo_v2_flash", "corrected", _PER_EXPERT + _PACKED, groups=True),
    Architecture("minimax", "corrected", _W123 + _PACKED),
    Architecture("minimax_m3_vl", "corrected", _W123 + _FUSED + _PACKED),
    Architecture(
        "muse_spark",
        "corrected",
        _PACKED,
        bias=False,
        since="0.32.2",
        note="Metal only, never run here; its router is one fused kernel",
    ),
    Architecture("nemotron_h", "corrected", _FC12, groups=True, sometimes=True),
    Architecture("solar_open", "corrected", _PER_EXPERT, groups=True),
    Architecture("step3p5", "corrected", _RENAMED),
    # family "logits"
    Architecture("gemma4", "logits", _FUSED, sometimes=True),
    Architecture("gemma4_text", "logits", _FUSED, sometimes=True),
    Architecture("gpt_oss", "logits", _INTERLEAVED),
    Architecture("granitemoe", "logits", _FUSED),
    Architecture("granitemoehybrid", "logits", _FUSED, sometimes=True),
    Architecture("jamba", "logits", _PER_EXPERT),
    Architecture("mixtral", "logits", _W123),
    Architecture("phixtral", "logits", _FC12),
    # one type each
    Architecture("llama4", "top-1", _TRANSPOSED, note="k = 1, so the bias acts only with J = 0"),
    Architecture("phimoe", "sparsemixer", _W123),
)

SUPPORTED: dict[str, Architecture] = {a.model_type: a for a in _ARCHITECTURES}

UNSUPPORTED: dict[str, str] = {
    "dbrx": "its experts are a Python list of dense layers without an mlx-lm switch, so they cannot be streamed",
}

# mlx-lm's renames that lead to a routed type: by config.json's model_type, and by (model_type, class in architectures).
RENAMES: dict[str, str] = {
    "deepseek_v41_text": "deepseek_v41",
    "gemma4_unified": "gemma4",
    "joyai_llm_flash": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "llava": "mistral3",
    "minimax_m2": "minimax",
    "phi-msft": "phixtral",
}
CLASS_RENAMES: dict[tuple[str, str], str] = {("bailing_hybrid", "BailingMoeV3ForCausalLM"): "bailing_moe_v3"}


def module_name(model_type: str, architectures: Sequence[str] = ()) -> str:
    """The mlx_lm.models module for config.json's `model_type` and `architectures`, by mlx-lm's own renames."""
    for name in architectures:
        if (model_type, name) in CLASS_RENAMES:
            return CLASS_RENAMES[model_type, name]
    return RENAMES.get(model_type, model_type)


def find(model_type: str, architectures: Sequence[str] = ()) -> Architecture | None:
    """The supported architecture of config.json's `model_type` and `architectures`; None if it is not in the table."""
    return SUPPORTED.get(module_name(model_type, architectures))
