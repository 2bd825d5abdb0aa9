"""How a token is chosen: mlx-lm's sampler, for every command that makes replies."""

from __future__ import annotations

from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .generation import Sampler


def sampler_for(
    tokenizer: TokenizerWrapper,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    min_tokens_to_keep: int,
    xtc_probability: float,
    xtc_threshold: float,
) -> Sampler:
    """mlx-lm's sampler with these options, which are mlx-lm's too, but for `top_p` 0.

    That is the smallest share, so the likeliest token only, as other servers and their clients have it; mlx-lm would
    sample from all tokens.
    """
    sampler: Sampler = make_sampler(
        temperature if top_p > 0 else 0.0,
        top_p,
        min_p,
        min_tokens_to_keep,
        top_k=top_k,
        xtc_probability=xtc_probability,
        xtc_threshold=xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids) if xtc_probability else [],
    )
    return sampler
