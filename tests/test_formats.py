"""Every weight format is streamed exactly. The default run takes a few model types; the matrix takes all of them."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from formats import FORMATS, write_format
from mlx_lm.utils import load_model
from tiny_models import ALL_TYPES, random_tokens, run_model, same_bits, tiny_config

from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel

# gate/up/down and fc1/fc2 switches, expert biases, latent projections around the experts, expert tensors in a stack of
# their own beside the router.
TYPES = ("qwen2_moe", "nemotron_h", "gpt_oss", "kimi_k3", "gemma4_text")
LENGTHS = [32, 9] + [1] * 6
TOKENS = random_tokens(1, sum(LENGTHS))


def check(folder: Path, *, counts: tuple[str, ...]) -> None:
    """Logits with the fewest, half and all slots are those of stock mlx-lm."""
    stock = load_model(folder)[0]
    expected = run_model(stock, TOKENS, LENGTHS)
    for count in counts:
        opened = OpenedModel(folder)
        k, experts = max(b.k for b in opened.blocks), max(b.num_experts for b in opened.blocks)
        slots = {"fewest": k, "half": max(k, experts // 2), "all": experts}[count]
        model = opened.load(MemoryOptions(slots=slots), CacheOptions(routing="original"))
        logits = run_model(model, TOKENS, LENGTHS)
        assert logits.dtype == expected.dtype
        assert same_bits(logits.astype(mx.float32), expected.astype(mx.float32)), f"{count} slots"
        assert count == "all" or model.expert_cache.stats.decode.misses > 0


@pytest.mark.parametrize(
    ("model_type", "name"),
    [(t, f) for t in TYPES for f in FORMATS if not f.startswith("bfloat16")] + [("qwen2_moe", "bfloat16-affine-4")],
)
def test_format_is_exact(tmp_path: Path, model_type: str, name: str) -> None:
    check(write_format(tmp_path / "model", tiny_config(model_type), name), counts=("fewest",))


@pytest.mark.matrix
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("model_type", [t for t in ALL_TYPES if t != "dbrx"])
def test_every_type_in_every_format_with_every_slot_count(tmp_path: Path, model_type: str, name: str) -> None:
    check(write_format(tmp_path / "model", tiny_config(model_type), name), counts=("fewest", "half", "all"))
