"""What speed.py compares when nothing else is asked for: suites of comparisons, each with its settings."""

from __future__ import annotations

from dataclasses import dataclass

DEMO = "demo"
QWEN = "qwen1.5-moe"
BIASED = "routing=cache-prior:strength=0.1"
SYNTHETIC_PROMPT = 32  # tokens: MLX's CPU kernels need a fifth of a second for each at real layer shapes


@dataclass(frozen=True)
class Suite:
    """Comparisons, each timed by itself; ratios are to the first configuration of each."""

    comparisons: tuple[tuple[str, ...], ...]
    checkpoint: str = QWEN
    rounds: int = 8
    tokens: int = 4  # per segment
    warm_up: int = 8  # tokens
    prompt: int = 0  # tokens of a prompt to time; 0: none
    decodes: bool = True  # False: prompts alone are timed, and flash=4x is a multiple of a prompt's compute

    def prompt_for(self, checkpoint: str) -> int:
        """Tokens of the prompt unless the user says how many."""
        return self.prompt if checkpoint == DEMO else min(self.prompt, SYNTHETIC_PROMPT)


def _span() -> Suite:
    pairs = tuple(
        (f"{base} span=1", base)
        for slots in ("50%", "75%")
        for base in (f"slots={slots} {BIASED} hostread={latency}" for latency in ("0", "0.5ms", "2ms"))
    )
    # How often layers find their experts is a running mean: what filling the cache missed is forgotten by then.
    return Suite(pairs, checkpoint=DEMO, rounds=16, tokens=8, warm_up=160)


def _look_ahead() -> Suite:
    pairs = tuple(
        (f"{base} lookahead=off", f"{base} lookahead=on")
        for slots in ("25%", "50%")
        for routing in ("routing=original", BIASED)
        for base in (f"slots={slots} {routing} flash={flash}x" for flash in ("0.25", "1", "4"))
    )
    # The engine waits and tries for about a hundred tokens of this model before it decides whether looking ahead pays.
    return Suite(pairs, checkpoint=DEMO, rounds=10, tokens=8, warm_up=112)


SUITES = {
    "standard": Suite(
        (("slots=50%", "slots=50% overlaps=off", f"slots=50% {BIASED}", "slots=50% flash=1x", "slots=all"),)
    ),
    "overlap": Suite((("slots=50% flash=1x overlaps=off", "slots=50% flash=1x"),)),
    "span": _span(),
    "look-ahead": _look_ahead(),
    "resident": Suite((("routing=stock", "slots=all", f"slots=all {BIASED}"),)),
    "flash": Suite(
        (
            (
                "slots=50% flash=4x",
                f"slots=50% flash=4x {BIASED}",
                "slots=50% flash=4x routing=cache-prior:strength=0.2",
            ),
        )
    ),
    "prefill": Suite(
        (("slots=all", "slots=50% flash=0.25x", "slots=50% flash=4x"),), checkpoint=DEMO, prompt=2048, decodes=False
    ),
    "strategies": Suite(
        (
            tuple(
                f"slots=50% routing={spec}"
                for spec in (
                    "original",
                    "cache-prior",
                    "price:delta=0.02",
                    "mass-budget:delta=0.01",
                    "bounded-regret:epsilon=0.01",
                    "max-rank:m=8",
                    "cumsum:p=0.6",
                )
            ),
        )
    ),
}
