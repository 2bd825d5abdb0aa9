"""Would it pay to guess the next layer's experts and read them early? An upper bound from a real run.

Each MoE layer's input, rescaled to the next layer's norm, is given to the next layer's router (the best guess that
others report); what it ranks highest and is not in memory would be read ahead. Text decodes token by token with the
caches and the routing of a real run, and for each layer the guess stands beside what was then missing.

From that follows what a look-ahead could save at most, for several ratios of read time to compute. Everything is
granted: the guess and the bookkeeping cost nothing, correct guesses are read first, a wrong one is cancelled the moment
the next layer has spoken, and reads have all of the time between two routers (`compute`, the layer's hits included) to
hide in. "In order" drops one of these: guesses are read by rank, and the read under way when the next layer has spoken
is finished.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from common import add_model_argument, bootstrap, environment, model_folder, positive, run
from held_out import text_windows
from mlx_lm.models.cache import make_prompt_cache

from mlx_moecache.calls import replace_call
from mlx_moecache.errors import UnsupportedModelError
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel

RATIOS = (0.25, 1.0, 4.0)  # read time to compute, as the run would have it without look-ahead
GUESSES = (1, 2, 3)  # experts guessed per layer, at most


class Guesses:
    """Watches one model: what the next layer's router says of this layer's input, and what was missing there then."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.inputs: dict[int, mx.array] = {}
        self.resident: dict[int, set[int]] = {}
        self.missed: dict[int, set[int]] = {}
        for i, layer in enumerate(model.layers):
            if not all(hasattr(layer, n) for n in ("mlp", "post_attention_layernorm")) or not hasattr(
                layer.mlp, "gate"
            ):
                raise UnsupportedModelError(
                    "this benchmark knows models whose layers have mlp.gate and a norm before it"
                )
            self._watch(i, layer.mlp)
        model.expert_cache.listener = self

    def used(self, layer: int, phase: str, experts: Any, missed: Any) -> None:
        self.missed[layer] = set(missed)

    def _watch(self, i: int, block: nn.Module) -> None:
        cls = type(block)
        upstream = cls.__call__

        def call(module: nn.Module, x: mx.array) -> Any:
            self.inputs[i] = x
            self.resident[i] = set(self.model.expert_cache.layers[i].residents.experts)
            return upstream(module, x)

        replace_call(block, call)

    def of_token(self) -> Iterator[tuple[list[int], set[int]]]:
        """Per layer but the first: experts not in memory as guessed, the best first, and those that were missing."""
        layers = self.model.layers
        for i in range(len(layers) - 1):
            scale = layers[i + 1].post_attention_layernorm.weight / layers[i].post_attention_layernorm.weight
            z = np.array(layers[i + 1].mlp.gate(self.inputs[i] * scale)).ravel()
            best = np.argsort(-z)[: max(GUESSES)].tolist()
            yield [e if e not in self.resident[i + 1] else -1 for e in best], self.missed[i + 1]


def record(model: nn.Module, windows: np.ndarray) -> list[list[tuple[list[int], set[int]]]]:
    """Per window, per token and layer: guesses and misses."""
    guesses, found = Guesses(model), []
    for window in windows:
        kv, rows = make_prompt_cache(model), []
        for token in window.tolist():
            mx.eval(model(mx.array([[token]]), cache=kv))
            rows += list(guesses.of_token())
        found.append(rows)
    return found


def share_saved(rows: list[tuple[list[int], set[int]]], most: int, ratio: float, *, in_order: bool) -> float:
    """The share of the run's time that reading up to `most` guesses ahead saves; compute of a layer is 1."""
    read = ratio * len(rows) / max(1, sum(len(missed) for _, missed in rows))  # of one expert
    saved = 0.0
    for guessed, missed in rows:
        guesses = [e for e in guessed[:most] if e >= 0]
        if not in_order:
            saved += min(1.0, read * len(missed & set(guesses)))
            continue
        time = 0.0  # the device is busy with guesses since the layer before has spoken
        for e in guesses:
            if time >= 1:
                break
            begun, time = time, time + read
            if e in missed:
                saved += min(read, 1 - begun)
            else:
                saved -= max(0.0, time - 1)
    return saved / (len(rows) * (1 + ratio))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    folder, name = model_folder(arguments.model)
    results = []
    for slots in arguments.slots:
        for routing in arguments.routing:
            opened = OpenedModel(folder)
            windows = text_windows(
                arguments.text,
                opened.tokenizer(),
                tail=arguments.tail,
                count=arguments.windows,
                length=arguments.length,
            )
            model = opened.load(MemoryOptions(slots=slots), CacheOptions(routing=routing))
            found = record(model, np.asarray(windows)[:, :-1])
            rows = [r for window in found for r in window]
            for most in GUESSES:
                counts = [_counts(window, most) for window in found]
                precision = bootstrap(counts, lambda c: float(c[:, 1].sum() / max(1, c[:, 0].sum())))
                recall = bootstrap(counts, lambda c: float(c[:, 1].sum() / max(1, c[:, 2].sum())))
                bounds = {
                    f"{ratio:g}": [share_saved(rows, most, ratio, in_order=o) for o in (False, True)]
                    for ratio in RATIOS
                }
                results.append(
                    {
                        "slots": slots,
                        "routing": routing,
                        "guesses": most,
                        "precision": vars(precision),
                        "recall": vars(recall),
                        "saved_at_most_and_in_order": bounds,
                    }
                )
    return {
        "model": name,
        "windows": arguments.windows,
        "length": arguments.length,
        "results": results,
        **environment(),
    }


def _counts(rows: list[tuple[list[int], set[int]]], most: int) -> list[int]:
    """Guesses that are not in memory, those of them that were needed, and all that were missing."""
    guessed = [{e for e in g[:most] if e >= 0} for g, _ in rows]
    right = sum(len(g & missed) for g, (_, missed) in zip(guessed, rows, strict=True))
    return [sum(map(len, guessed)), right, sum(len(missed) for _, missed in rows)]


def describe(record: dict[str, Any]) -> str:
    head = "".join(f"{f'reads = {r:g} x compute':>24}" for r in RATIOS)
    lines = [
        "time saved by reading ahead: at most / in order",
        f"{'slots':>5}  {'routing':14}{'guesses':>8}{'precision':>11}{'recall':>8}{head}",
    ]
    for r in record["results"]:
        bounds = "".join(f"{f'{a:.1%} / {b:.1%}':>24}" for a, b in r["saved_at_most_and_in_order"].values())
        quality = f"{r['precision']['value']:11.2f}{r['recall']['value']:8.2f}"
        lines.append(f"{r['slots']:5}  {r['routing']:14}{r['guesses']:8}{quality}{bounds}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_argument(parser)
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="text; its end is used")
    parser.add_argument("--tail", type=float, default=0.05, help="share of each text (default: %(default)s)")
    parser.add_argument("--slots", type=positive, nargs="+", default=[15, 30, 45], help="(default: 15 30 45)")
    parser.add_argument(
        "--routing", nargs="+", default=["original", "cache-prior"], help="(default: original cache-prior)"
    )
    parser.add_argument("--windows", type=positive, default=4, help="of text (default: %(default)s)")
    parser.add_argument("--length", type=positive, default=256, help="tokens per window (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    arguments = parser.parse_args()
    found = measure(arguments)
    if not arguments.json:
        print(describe(found))
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(run(main))
