"""A tokenizer as Llama-style models have it, made here: "▁" before each word, and also before the first one."""

from __future__ import annotations

from typing import Any

from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer, TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

WORDS = ("▁once", "▁upon", "▁a", "▁time", "▁user", "▁hi", "user")


def llama_like() -> Any:
    """Normaliser and decoder are those of Mixtral's and Phi-3.5-MoE's tokenizer.json."""
    vocabulary = ["<unk>", "<s>", "</s>", "▁", "\n", *"abcdefghijklmnopqrstuvwxyz.,:"]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for n in range(1, len(word)):
            if (word[:n], word[n]) not in merges:
                merges.append((word[:n], word[n]))
            if word[: n + 1] not in vocabulary:
                vocabulary.append(word[: n + 1])
    made = Tokenizer(models.BPE({x: i for i, x in enumerate(vocabulary)}, merges, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return TokenizerWrapper(fast, SPMStreamingDetokenizer)
