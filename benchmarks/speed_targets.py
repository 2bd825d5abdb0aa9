"""Which targets do records of speed.py meet? One verdict for each that a record can decide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

OVER_LIMIT = 1.1
OF_ALLOWED = 0.9
OF_STOCK = 0.98
OF_DISK = 0.9
PREFILL_COMPUTE, PREFILL_FLASH = 0.8, 0.9
FLASH_BOUND = 1.0  # reads that take longer than all of the computing
TELLING = 0.2  # of a ratio: an interval that is wider decides nothing
LARGE = 10**6  # bytes of an expert: reads of smaller ones are held up by latency, whatever the reader does
LEAST_ROUNDS, LEAST_PROMPTS = 6, 3  # of fewer, the interval means little
MET, MISSED, NOISY = "met", "**not met**", "too noisy to tell"
FEW, UNUSED = "too few rounds to tell", "not used here"


@dataclass(frozen=True)
class Verdict:
    """One measured ratio beside its target."""

    what: str
    measured: str
    target: str
    verdict: str  # MET, MISSED, NOISY, FEW, UNUSED
    note: str = ""


def verdicts(record: dict[str, Any]) -> Iterator[Verdict]:
    """Every target that this record can decide: met when the interval, narrow enough to tell, reaches it."""
    for c in record["comparisons"]:
        timed = [*_resident(c), *_fewer_bytes(c), *_on_off(c), *_limits(c)]
        yield from (_enough(v, record["rounds"] >= LEAST_ROUNDS) for v in timed)
        yield from (_enough(v, record["prompts"] >= LEAST_PROMPTS) for v in _prefill(c))
        if record["suite"] == "strategies":
            yield from _host_reads(c)


def _enough(v: Verdict, enough: bool) -> Verdict:
    return v if enough or v.verdict == UNUSED else replace(v, verdict=FEW)


def at_least(what: str, x: dict[str, float], target: float, note: str = "") -> Verdict:
    return Verdict(what, interval(x, 3), f">= {target:g}", _met(x["high"] >= target, x), note)


def interval(x: dict[str, float], digits: int) -> str:
    return f"{x['value']:.{digits}f} [{x['low']:.{digits}f} {x['high']:.{digits}f}]"


def _met(met: bool, x: dict[str, float]) -> str:
    if x["high"] - x["low"] > TELLING * abs(x["value"]):
        return NOISY
    return MET if met else MISSED


def _resident(c: dict[str, Any]) -> Iterator[Verdict]:
    if c["decode"] and c["decode"][0]["name"] == "routing=stock":
        for d in c["decode"][1:]:
            if not d["host_reads"]:
                yield at_least(f"`{d['name']}` / stock mlx-lm, tokens per second", d["ratio"], OF_STOCK)


def _fewer_bytes(c: dict[str, Any]) -> Iterator[Verdict]:
    """Biased against original routing with the same slots and the same flash."""
    settings = {x["text"]: x for x in c["configurations"]}
    if not c["decode"]:
        return
    first = c["decode"][0]
    base = settings[first["name"]]
    for d in c["decode"][1:]:
        here = settings[d["name"]]
        alike = all(here[name] == base[name] for name in ("slots", "flash", "host_read", "engine"))
        biased = base["routing"] == "original" != here["routing"]
        if not (alike and biased and here["flash"] and d["allowed_ratio"]):
            continue
        share = {k: v / d["allowed_ratio"] for k, v in d["ratio"].items()}
        price = c["perplexity"].get(d["name"])
        note = (
            f"x {interval(d['ratio'], 3)} of the x {d['allowed_ratio']:.3f} that its bytes allow (the paper: up to 2)"
        )
        yield at_least(
            f"`{d['name']}` / original: of the speed-up that fewer bytes allow",
            share,
            OF_ALLOWED,
            note + (f"; perplexity {price}" if price else "; perplexity not measured"),
        )


def _on_off(c: dict[str, Any]) -> Iterator[Verdict]:
    """An engine option against the same without it: kept only if it wins."""
    settings = {x["text"]: x for x in c["configurations"]}
    if len(c["decode"]) < 2:
        return
    first, base = c["decode"][0], settings[c["decode"][0]["name"]]
    off = {"span": "1", "lookahead": "off", "overlaps": "off"}
    for d in c["decode"][1:]:
        here = settings[d["name"]]
        alike = all(here[name] == base[name] for name in ("slots", "flash", "host_read", "routing"))
        changed = {tuple(x) for x in base["engine"]} ^ {tuple(x) for x in here["engine"]}
        names = {name for name, _ in changed}
        if (
            not alike
            or len(names) != 1
            or not any((name, off.get(name)) in {tuple(x) for x in base["engine"]} for name in names)
        ):
            continue
        (name,) = names
        x = d["ratio"]
        decided = NOISY if x["low"] <= 1 <= x["high"] else MET if x["low"] > 1 else MISSED
        if (name == "span" and d["spans"] and d["spans"][2] == 1) or (name == "lookahead" and not d["read_ahead"]):
            decided = UNUSED  # the engine found that it would not pay
        yield Verdict(
            f"{name} on / off: `{d['name']}`",
            interval(x, 3),
            "> 1 to be kept",
            decided,
            f"host reads per token {first['host_reads']:.2f} -> {d['host_reads']:.2f}",
        )


def _limits(c: dict[str, Any]) -> Iterator[Verdict]:
    for d in c["decode"]:
        x = d["limit"]
        if x is not None and d["host_reads"]:
            over, idle = x["over"], x["over_with_idle"]
            note = "" if idle is None else f"over the limit with idle waits {interval(idle, 3)}"
            yield Verdict(
                f"`{d['name']}`: token / its limit",
                interval(over, 3),
                f"<= {OVER_LIMIT:g}",
                _met(over["low"] <= OVER_LIMIT, over),
                note,
            )
        if d["raw_share"] is not None and (c["bytes_per_expert"] or 0) >= LARGE:
            yield at_least(f"`{d['name']}`: reads / sequential read of the same file", d["raw_share"], OF_DISK)


def _prefill(c: dict[str, Any]) -> Iterator[Verdict]:
    for p in c["prefill"]:
        if p["flash_share"] is None:
            continue
        title = f"prefill of {p['tokens']} tokens, `{p['name']}`"
        if p["reads_over_first"] > FLASH_BOUND:
            yield at_least(f"{title}: bytes per second / flash", p["flash_share"], PREFILL_FLASH, "flash-bound")
        elif c["prefill"][0]["name"] == "slots=all":
            yield at_least(f"{title} / all resident", p["ratio"], PREFILL_COMPUTE, "compute-bound")


def _host_reads(c: dict[str, Any]) -> Iterator[Verdict]:
    counts = [d["host_reads"] for d in c["decode"]]
    if len(counts) > 1:
        more = [d["name"] for d in c["decode"] if d["host_reads"] > counts[0] + 1e-6]
        yield Verdict(
            "host reads per token of the strategies, against original routing",
            f"{min(counts):.2f} to {max(counts):.2f}",
            "none more",
            MISSED if more else MET,
            ", ".join(f"`{name}`" for name in more),
        )


def rows(found: Sequence[Verdict]) -> Iterator[str]:
    """As lines of a table."""
    yield "| | measured | target | | |"
    yield "| --- | --- | --- | --- | --- |"
    for v in found:
        yield f"| {v.what} | {v.measured} | {v.target} | {v.verdict} | {v.note} |"
