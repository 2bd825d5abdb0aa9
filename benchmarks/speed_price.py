"""What the bias of a configuration costs in quality: read from the results of the sweeps beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from speed_setup import Side

from mlx_moecache.errors import MoeCacheError
from mlx_moecache.routing import Original, parse_routing
from mlx_moecache.study.results import ModelFacts, Results, Run, load, paired

RESULTS = Path(__file__).parent / "results"


def prices(sides: Sequence[Side], folder: Path = RESULTS) -> dict[str, str]:
    """Name -> perplexity relative to original routing on the demo model, at the same share of slots, if measured."""
    found = {}
    for side in sides:
        cache = side.cache
        if cache is None or isinstance(cache.strategy, Original):
            continue
        share = cache.slots_per_layer[0] / cache.layers[0].num_experts
        for path in sorted(folder.glob("lru-*.json")):
            try:
                results = load(path)
                price = _price(results, cache.strategy.spec, round(share * results.model.experts))
            except MoeCacheError:
                continue
            if price is not None:
                found[side.name] = price
    return found


def _price(results: Results, spec: str, slots: int) -> str | None:
    here = [r for r in results.runs if r.complete and r.slots == slots and r.eviction == "lru"]
    exact = next((r for r in here if r.strategy == "original"), None)
    biased = next((r for r in here if _spec(r, results.model) == spec), None)
    if exact is None or biased is None:
        return None
    ratio = paired(exact, biased).perplexity_ratio
    return None if ratio is None else f"x {ratio.value:.4f} [{ratio.low:.4f} {ratio.high:.4f}]"


def _spec(run: Run, model: ModelFacts) -> str:
    """With the defaults that the run had, all parameters written out."""
    chosen = parse_routing(run.routing, strength=None, top_j=None, k=model.k, slots=run.slots, experts=model.experts)
    return chosen.spec
