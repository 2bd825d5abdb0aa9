"""The facts of `mlx_moecache info` as one screen of at most 80 columns, and as one JSON object. Plain Python."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from ..budget import format_bytes
from .memory_table import BudgetRow
from .model_summary import Format, ModelSummary

WIDTH = 80
_LABEL = 20  # columns of the labels on the left
_RATES = (WIDTH - _LABEL) // 10  # hit rates side by side


def screen(
    name: str, summary: ModelSummary, rows: Sequence[BudgetRow], hit_rates: Sequence[float], *, max_context: int
) -> list[str]:
    """Lines for people. Bytes are decimal: 1 GB = 1e9."""
    experts = _range(layer.experts for layer in summary.layers)
    shared = f"{summary.shared_experts} per layer, {format_bytes(summary.shared_expert_bytes)} in all"
    return [
        *_wrapped("model", name),
        *_wrapped("type", summary.model_type),
        *_wrapped("MoE layers", f"{len(summary.layers)} of {summary.num_layers}"),
        *_wrapped("experts", f"{experts} per layer, {_top_k(summary)} per token"),
        *_wrapped("shared experts", shared if summary.shared_experts else "none"),
        *_wrapped("router", _router(summary)),
        "",
        *_format_lines(summary),
        "",
        *_wrapped("one expert", _sizes(layer.bytes_per_expert for layer in summary.layers)),
        *_wrapped("one layer", f"{_sizes(layer.nbytes for layer in summary.layers)} of experts"),
        *_wrapped("all experts", format_bytes(summary.experts)),
        *_wrapped("resident", f"{format_bytes(summary.resident)}: everything else, always in memory"),
        *_wrapped("total", format_bytes(summary.total)),
        "",
        *_hit_rate_lines(summary, hit_rates),
        "",
        *_budget_lines(summary, rows, max_context),
    ]


def as_json(
    summary: ModelSummary, rows: Sequence[BudgetRow], hit_rates: Sequence[float], *, max_context: int
) -> dict[str, Any]:
    """The same facts, unrounded; lists over layers follow `moe_layers`. What is unknown or not so is null."""
    return {
        "model_type": summary.model_type,
        "layers": summary.num_layers,
        "moe_layers": [layer.path for layer in summary.layers],
        "experts_per_layer": [layer.experts for layer in summary.layers],
        "experts_per_token": [layer.k for layer in summary.layers],
        "shared_experts": summary.shared_experts,
        "router": asdict(summary.router),
        "quantisation": {
            "experts": {name: _formats_json(counts) for name, counts in summary.expert_formats.items()},
            **{part.lower().replace(" ", "_"): _formats_json(counts) for part, counts in summary.formats.items()},
        },
        "bytes": {
            "per_expert": [layer.bytes_per_expert for layer in summary.layers],
            "per_layer": [layer.nbytes for layer in summary.layers],
            "experts": summary.experts,
            "shared_experts": summary.shared_expert_bytes,
            "resident": summary.resident,
            "total": summary.total,
        },
        "bytes_per_token": [{"hit_rate": rate, "bytes": round(summary.bytes_per_token(rate))} for rate in hit_rates],
        "max_context": max_context,
        "budgets": [_row_json(row) for row in rows],
    }


def _top_k(summary: ModelSummary) -> str:
    counts = Counter(layer.k for layer in summary.layers)
    if len(counts) == 1:
        return str(summary.layers[0].k)
    return ", ".join(f"{k} (in {n} layer{'' if n == 1 else 's'})" for k, n in sorted(counts.items()))


def _router(summary: ModelSummary) -> str:
    router = summary.router
    kind = router.title or "of a kind not in our table"
    if router.groups:
        kind += ", may rule out groups of experts"
    use = "can be biased" if router.bias else "cannot be biased: this model runs with --exact only"
    return f"{kind}; {use}" + (f" ({router.note})" if router.note else "")


def _format_lines(summary: ModelSummary) -> list[str]:
    projections = sorted(summary.expert_formats.items())
    alike = all(counts == projections[0][1] for _, counts in projections)
    named = [("experts", projections[0][1])] if alike else [(f"experts {name}", counts) for name, counts in projections]
    lines = ["stored as"]
    for part, counts in [*named, *summary.formats.items()]:
        lines += _wrapped(f"  {part}", _formats(counts))
    return lines


def _formats(counts: Counter[Format]) -> str:
    if len(counts) == 1:
        return str(next(iter(counts)))
    return "; ".join(f"{form} ({n}x)" for form, n in counts.most_common())


def _formats_json(counts: Counter[Format]) -> list[dict[str, Any]]:
    return [{**asdict(form), "weights": n} for form, n in counts.most_common()]


def _hit_rate_lines(summary: ModelSummary, hit_rates: Sequence[float]) -> list[str]:
    lines = []
    for start in range(0, len(hit_rates), _RATES):
        part = hit_rates[start : start + _RATES]
        sizes = (format_bytes(round(summary.bytes_per_token(rate))) for rate in part)
        lines.append(f"{'hit rate':<{_LABEL}}" + "".join(f"{f'{100 * rate:.4g}%':<10}" for rate in part))
        lines.append(f"{'read per token':<{_LABEL}}" + "".join(f"{size:<10}" for size in sizes))
    return [line.rstrip() for line in lines]


def _budget_lines(summary: ModelSummary, rows: Sequence[BudgetRow], max_context: int) -> list[str]:
    experts = sum(layer.experts for layer in summary.layers)
    lines = [f"{'memory budget':<{_LABEL}}{'slots per layer':<16}{'share':<8}prompt chunk"]
    for row in rows:
        size = format_bytes(row.budget, up=row.label in ("smallest", "all experts"))
        if row.plan is None:
            cells = f"{'too small':<39}"
        else:
            slots = f"{_range(row.plan.slots_per_layer)} of {_range(layer.experts for layer in summary.layers)}"
            share = f"{sum(row.plan.slots_per_layer) / experts:.0%}"
            cells = f"{slots:<16}{share:<8}{row.plan.prefill_step_size:<15}"
        lines.append(f"{size:<{_LABEL}}{cells}{row.label}"[:WIDTH].rstrip())
    kv = next((row.plan.kv for row in rows if row.plan is not None), None)
    reserved = "" if kv is None else f" ({format_bytes(kv)} of KV cache)"
    return [*lines, *textwrap.wrap(f"With room for {max_context:,} tokens{reserved}.", WIDTH)]


def _row_json(row: BudgetRow) -> dict[str, Any]:
    plan = row.plan
    if plan is None:
        return {"label": row.label, "budget": row.budget, "fits": False, "slots_per_layer": None, "plan": None}
    return {
        "label": row.label,
        "budget": row.budget,
        "fits": True,
        "slots_per_layer": list(plan.slots_per_layer),
        "plan": {**plan.parts(), "total": plan.total, "prefill_step_size": plan.prefill_step_size},
    }


def _wrapped(label: str, text: str) -> list[str]:
    """`text` beside `label`, on as many lines as it needs."""
    lines = textwrap.wrap(text, WIDTH - _LABEL, break_on_hyphens=False)
    return [f"{label if i == 0 else '':<{_LABEL}}{line}" for i, line in enumerate(lines)]


def _sizes(sizes: Iterable[int]) -> str:
    values = list(sizes)
    low, high = format_bytes(min(values)), format_bytes(max(values))
    return low if low == high else f"{low} to {high}"


def _range(values: Iterable[int]) -> str:
    found = list(values)
    low, high = min(found), max(found)
    return str(low) if low == high else f"{low}-{high}"
