"""Sampling options mean the same in generate, chat and server."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from test_server_engine import answer

from mlx_moecache.console.chat_session import ReplySettings
from mlx_moecache.console.options import sampler_of
from mlx_moecache.generation import Sampler
from mlx_moecache.serving.requests import Sampling

TOKENIZER: Any = SimpleNamespace(encode=lambda text: [1], eos_token_ids=[0])
LIKELIEST = 7


def from_flags(top_p: float) -> Sampler:
    return sampler_of(argparse.Namespace(**vars(ReplySettings(temp=1.0, top_p=top_p))), TOKENIZER, 300)


def from_request(top_p: float) -> Sampler:
    sampler: Sampler = answer("a", sampling=Sampling(temperature=1.0, top_p=top_p))[2].options["sampler"]
    return sampler


@pytest.mark.parametrize("make", [from_flags, from_request])
def test_top_p_0_is_the_likeliest_token_only(make: Any) -> None:
    mx.random.seed(0)
    logprobs = mx.log(mx.softmax(mx.zeros((1, 300)).at[0, LIKELIEST].add(0.1)))

    def drawn(top_p: float) -> set[int]:
        sampler = make(top_p)
        return {int(sampler(logprobs).item()) for _ in range(20)}

    assert drawn(0.0) == {LIKELIEST}
    assert len(drawn(0.9)) > 5 and len(drawn(1.0)) > 5
