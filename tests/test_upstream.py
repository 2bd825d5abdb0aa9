"""The guard against upstream change: every routed-expert model type of the installed mlx-lm is in our table."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import pytest
from mlx_lm.utils import MODEL_ARCHITECTURE_REMAPPING, MODEL_REMAPPING
from model_files import Module, is_routed, reached, seam_can_see, switches, words_in

from mlx_moecache.architectures import CLASS_RENAMES, RENAMES, SUPPORTED, UNSUPPORTED, find
from mlx_moecache.seam import CORRECTION_BIASES

WRAPPED = {"SwitchGLU", "SwitchMLP"}  # the switch layers that moe_block.py can take over


def complaints(modules: Mapping[str, Module], installed: str) -> list[str]:
    """What a maintainer must do about the difference between our table and these model files; one line each."""
    table = "mlx_moecache/architectures.py"
    lines = []
    routed = {name for name in modules if is_routed(modules, name)}
    for name in sorted(routed - set(SUPPORTED) - set(UNSUPPORTED), key=str.lower):
        lines.append(
            f"mlx_lm/models/{name}.py has routed experts and is not in {table}: add it to SUPPORTED (family, raw "
            "layouts, bias) with a tiny configuration in tests/tiny_moe_configs.json, or to UNSUPPORTED with the reason"
        )
    for name in sorted({*SUPPORTED, *UNSUPPORTED} - routed, key=str.lower):
        since = SUPPORTED[name].since if name in SUPPORTED else ""
        if since and _numbers(installed) < _numbers(since):
            continue
        what = "has no routed experts" if name in modules else "is not there"
        lines.append(f"{name} is in {table}, but mlx_lm/models/{name}.py {what}: remove it, or give its first version")
    for name in sorted(routed & set(SUPPORTED), key=str.lower):
        if not switches(reached(modules, name)) & WRAPPED:
            lines.append(
                f"mlx_lm/models/{name}.py no longer uses {' or '.join(sorted(WRAPPED))}: teach "
                f"mlx_moecache/moe_block.py its layer, or move it to UNSUPPORTED in {table}"
            )
        if SUPPORTED[name].bias and not seam_can_see(modules, name):
            lines.append(
                f"mlx_lm/models/{name}.py selects experts without mx.argpartition along the last axis, which the seam "
                f"cannot see: teach mlx_moecache/seam.py its router, or set bias=False in {table}"
            )
    return lines


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


@pytest.fixture(scope="module")
def upstream() -> dict[str, Module]:
    spec = importlib.util.find_spec("mlx_lm.models")
    assert spec is not None and spec.submodule_search_locations is not None
    folder = Path(next(iter(spec.submodule_search_locations)))
    return {file.stem: Module.parse(file.read_text(encoding="utf-8")) for file in folder.glob("*.py")}


# ---- the installed mlx-lm ----


def test_every_routed_type_of_mlx_lm_is_in_the_table(upstream: dict[str, Module]) -> None:
    lines = complaints(upstream, version("mlx-lm"))
    assert not lines, f"mlx-lm {version('mlx-lm')} and our table differ:\n" + "\n".join(lines)


def test_wrapper_types_are_seen_through_the_files_that_they_build_on(upstream: dict[str, Module]) -> None:
    wrappers = ("kimi_vl", "kimi_k25", "mistral3", "qwen3_5", "qwen3_5_moe", "qwen3_vl_moe", "gemma4", "solar_open")
    for name in wrappers:
        assert is_routed(upstream, name), name


def test_dense_types_are_not_taken_for_routed_ones(upstream: dict[str, Module]) -> None:
    for name in ("llama", "qwen3", "gemma3n", "ministral3", "llama4_text", "cohere2", "switch_layers", "base", "cache"):
        assert not is_routed(upstream, name), name


def test_families_and_groups_of_the_table_are_those_of_the_model_files(upstream: dict[str, Module]) -> None:
    replaces_router = {"mistral3", "mistral4"}  # built on DeepSeek-V3's layers, but with a softmax router
    router_since = {"phimoe": "0.32.1"}  # before, mlx-lm gave it a softmax over the selected logits
    for name, architecture in SUPPORTED.items():
        if name not in upstream or _numbers(version("mlx-lm")) < _numbers(router_since.get(name, "0")):
            continue
        symbols = reached(upstream, name)
        blocks = [upstream[m].definitions[d] for m, d in symbols if not d.endswith(("Args", "Config", "Model"))]
        words = {word for block in blocks for word in words_in(block)}
        corrected = bool(words & set(CORRECTION_BIASES)) and name not in replaces_router
        assert corrected == (architecture.family == "corrected"), f"{name}: correction bias"
        assert ("sparsemixer" in words) == (architecture.family == "sparsemixer"), name
        assert ("n_group" in words) == architecture.groups, f"{name}: groups"
        if architecture.family == "top-1":
            assert "sigmoid" in words, name
        elif architecture.family in ("softmax", "logits"):
            assert words & {"softmax", "Softmax"}, name


def test_renames_are_those_of_mlx_lm() -> None:
    known = {*SUPPORTED, *UNSUPPORTED}
    assert {k: v for k, v in MODEL_REMAPPING.items() if v in known} == RENAMES, "update RENAMES in architectures.py"
    classes = {k: v for k, v in MODEL_ARCHITECTURE_REMAPPING.items() if v in known}
    assert classes == CLASS_RENAMES, "update CLASS_RENAMES in architectures.py"


def test_find_follows_the_renames() -> None:
    assert find("kimi_k2") is SUPPORTED["deepseek_v3"]
    assert find("bailing_hybrid", ["BailingMoeV3ForCausalLM"]) is SUPPORTED["bailing_moe_v3"]
    assert find("bailing_hybrid", ["BailingMoeV2_5ForCausalLM"]) is SUPPORTED["bailing_hybrid"]
    assert find("llama") is None
    assert find("dbrx") is None


# ---- the detector itself, on made-up model files ----

SWITCH_LAYERS = "class SwitchLinear: pass\nclass SwitchGLU:\n    def f(self): return SwitchLinear\n"

ROUTED = """
import mlx.core as mx
from .switch_layers import SwitchGLU

class Block:
    def __init__(self, args):
        self.experts = SwitchGLU(args)
    def __call__(self, x):
        inds = mx.argpartition(-self.gate(x), kth=3, axis=-1)[..., :4]
        return self.experts(x, inds)

class Helper: pass
class Model:
    def __init__(self, args): self.layers = [Block(args)]
"""

# A kernel that selects; the groups are chosen by an argpartition that the seam leaves alone.
FUSED = """
import mlx.core as mx
from ..kernels import expert_routing
from .switch_layers import SwitchGLU

class Indexer:
    def __call__(self, scores): return mx.argpartition(scores, kth=-2, axis=-1)

class Block:
    def __init__(self, args): self.experts, self.attention = SwitchGLU(args), Indexer()
    def __call__(self, x):
        groups = mx.argpartition(x, kth=1, axis=-2)
        return self.experts(x, expert_routing(x, groups))

class Model:
    def __init__(self, args): self.layers = [Block(args)]
"""

LISTED = """
import mlx.core as mx

class Block:
    def __init__(self, args): self.experts = [MLP(args) for _ in range(args.num_experts)]
    def __call__(self, x): return [self.experts[i](x) for i in mx.topk(x, 2).tolist()]

class MLP: pass
class Model:
    def __init__(self, args): self.layers = [Block(args)]
"""

SPARSE_ATTENTION = """
import mlx.core as mx

class Indexer:
    def __call__(self, scores): return mx.argpartition(scores, kth=-2, axis=-1)

class Model:
    def __init__(self, args): self.indexer = Indexer()
"""

TOPK_FUNCTION = """
import mlx.core as mx
from .switch_layers import SwitchGLU

def best(a, k, axis=-1): return mx.argpartition(a, kth=-k, axis=axis)

@mx.compile
def select(scores): return best(scores, 2)

class Block:
    def __init__(self, args): self.experts = SwitchGLU(args)
    def __call__(self, x): return self.experts(x, best(self.gate(x), 2))

class Model:
    def __init__(self, args): self.layers = [Block(args)]
"""


def parse(**sources: str) -> dict[str, Module]:
    return {name: Module.parse(source) for name, source in {"switch_layers": SWITCH_LAYERS, **sources}.items()}


def test_a_switch_layer_or_a_selection_among_experts_makes_a_type_routed() -> None:
    modules = parse(a=ROUTED, b=FUSED, c=LISTED, d=SPARSE_ATTENTION, e=TOPK_FUNCTION)
    assert [name for name in modules if is_routed(modules, name)] == ["a", "b", "c", "e"]


@pytest.mark.parametrize(
    "source",
    [
        "from .a import Model",
        "from . import a\nclass Model(a.Model): pass",
        "from . import a as base\nclass Model:\n    def __init__(self, args): self.m = base.Block(args)",
        "from .a import Block as B\nMLPS = {'moe': B}\nclass Model:\n    def __init__(self): self.m = MLPS['moe']()",
        "from mlx_lm.models.a import Model as Base\nModel = Base",
        "from .middle import Model",
        "class Model:\n    def __init__(self):\n        from . import a\n        self.m = a.Model()",
    ],
)
def test_a_type_that_builds_on_a_routed_one_is_routed(source: str) -> None:
    modules = parse(a=ROUTED, middle="from .a import Model", wrapper=source)
    assert is_routed(modules, "wrapper")


def test_a_dense_type_that_borrows_a_helper_of_a_routed_one_is_dense() -> None:
    modules = parse(a=ROUTED, dense="from .a import Helper, Block\nclass Model:\n    def f(self): return Helper()")
    assert not is_routed(modules, "dense")


def test_the_seam_sees_an_argpartition_of_a_block_or_of_a_function_that_it_calls() -> None:
    modules = parse(a=ROUTED, b=FUSED, e=TOPK_FUNCTION)
    assert seam_can_see(modules, "a")
    assert seam_can_see(modules, "e")
    assert not seam_can_see(modules, "b")


def test_complaints_name_the_file_and_what_to_do() -> None:
    modules = parse(brand_new_moe=ROUTED, mixtral=FUSED, dbrx="class Model: pass", phimoe=LISTED)
    lines = complaints(modules, "0.32.2")
    assert any(line.startswith("mlx_lm/models/brand_new_moe.py has routed experts and is not in") for line in lines)
    assert any("mixtral.py selects experts without mx.argpartition" in line for line in lines)
    assert any("dbrx.py has no routed experts" in line for line in lines)
    assert any("phimoe.py no longer uses SwitchGLU" in line for line in lines)
    assert any("qwen3_moe.py is not there" in line for line in lines)


def test_types_that_are_newer_than_the_installed_mlx_lm_are_not_missed() -> None:
    assert not any(line.startswith("muse_spark") for line in complaints({}, "0.32.0"))
    assert any(line.startswith("muse_spark") for line in complaints({}, "0.33.0"))
