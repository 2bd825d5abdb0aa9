"""Prompt caches that mlx_lm.cache_prompt saved: the KV cache of a prefix, and the model it belongs to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache, load_prompt_cache

from ..errors import UsageError
from ..footprint import KVOptions


@dataclass(frozen=True)
class SavedPrompt:
    """A prefix that need not be computed again."""

    path: Path
    cache: list[Any]  # mlx-lm KV caches, one per layer
    model: str  # as it was named when the cache was made
    eos_tokens: tuple[str, ...]  # that the maker of the cache added
    tokens: int

    def kv_options(self, kv: KVOptions) -> KVOptions:
        """`kv`, with what the saved cache already decides. Raises UsageError where they contradict each other."""
        first = self.cache[0]
        if isinstance(first, QuantizedKVCache):
            for flag, asked, has in (
                ("--kv-bits", kv.bits, first.bits),
                ("--kv-group-size", kv.group_size, first.group_size),
            ):
                if asked is not None and asked != has:
                    raise UsageError(f"{flag} {asked} does not match {self.path}, which was made with {has}; use that")
            return KVOptions(bits=first.bits, group_size=first.group_size, quantized_start=0)
        if kv.max_size is not None:
            raise UsageError("--max-kv-size is decided when a prompt cache is made; leave it out here")
        if all(isinstance(c, RotatingKVCache) for c in self.cache):
            return KVOptions(max_size=first.max_size)
        return kv

    def check_model(self, name: str) -> None:
        """Raise UsageError if `name` is another model than the one the cache was made with."""
        if name != self.model and not _same_folder(name, self.model):
            raise UsageError(f"{self.path} was made with the model {self.model}, not with {name}; leave --model out")

    def check_layers(self, layers: int) -> None:
        """Raise UsageError if the cache has another number of layers than the model."""
        if len(self.cache) != layers:
            raise UsageError(
                f"{self.path} has {len(self.cache)} layers, the model {layers}: make the prompt cache again"
            )


def read_saved_prompt(path: Path) -> SavedPrompt:
    """Open a prompt cache; its arrays are read when they are first used. Raises UsageError if it is none."""
    if not path.is_file():
        raise UsageError(f"there is no prompt cache file {path}; mlx_lm.cache_prompt makes one")
    try:
        cache, metadata = load_prompt_cache(str(path), return_metadata=True)
        model = str(metadata["model"])
        eos = json.loads(metadata.get("tokenizer_config", "{}")).get("eos_token")
        tokens = max(int(getattr(c, "offset", 0)) for c in cache)
    except Exception as e:  # MLX, mlx-lm and the metadata each have their own way to fail
        raise UsageError(f"{path} is not a prompt cache of mlx_lm.cache_prompt ({type(e).__name__}: {e})") from e
    return SavedPrompt(path, cache, model, () if eos is None else (str(eos),), tokens)


def _same_folder(a: str, b: str) -> bool:
    return Path(a).is_dir() and Path(b).is_dir() and Path(a).resolve() == Path(b).resolve()
