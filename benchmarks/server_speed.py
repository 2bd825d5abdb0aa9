"""How fast does a reply arrive through the server? Decode speed at a client against `generate` on the same model.

The server is a process of its own, as it is started by users, and the client reads its stream over a socket. `generate`
is our stream_generate in this process, each piece of text written and flushed as the command does. Both reply greedily
and exactly to the same prompt, with the same slots, so they compute the same tokens and read about the same experts. A
*round* is four replies in the order generate, server, server, generate, so that a slow drift of the machine's speed
cancels; its ratio is the time of the two replies of generate over that of the server's (1.00: as fast, below: the
server is slower). Timed is what lies between the first and the last token, where the client sees them. The control
times generate against itself in the same way: it shows how far from 1.00 chance alone leads. Where other work disturbs
the machine, the ratio of the fastest tenth of the replies of each side is steadier.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from common import Array, Estimate, add_model_argument, bootstrap, environment, median, model_folder, positive, run
from tqdm import tqdm

import mlx_moecache

TARGET = 0.97  # tokens per second, server / generate
PROMPT = "Once upon a time there was a little dog."
TELLING = 0.1  # a wider interval decides nothing
FASTEST = 0.1
Reply = tuple[float, int, str]  # seconds between first and last token, tokens, text


@dataclass(frozen=True)
class Result:
    what: str  # "server" | "control"
    ratio: Estimate  # median over rounds
    fastest_ratio: Estimate  # of the times that a tenth of each side's replies stay below
    spread: tuple[float, float]  # quartiles of the rounds
    generate_tps: float  # median
    other_tps: float
    same_text: bool
    rounds: int


def through_server(port: int, tokens: int) -> Reply:
    """A streamed reply, timed where its pieces arrive."""
    c = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps({"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, **options})
    c.request("POST", "/v1/completions", body)
    moments, pieces, n = [], [], 0
    for line in c.getresponse():
        if not line.startswith(b"data: {"):
            continue
        now = time.perf_counter()
        chunk = json.loads(line[6:])
        if chunk.get("usage"):
            n = chunk["usage"]["completion_tokens"]
        elif chunk["choices"][0]["text"]:
            moments.append(now)
            pieces.append(chunk["choices"][0]["text"])
    c.close()
    return moments[-1] - moments[0], n, "".join(pieces)


@contextmanager
def serving(folder: Path, flags: list[str]) -> Iterator[int]:
    """A server on a free port, which is yielded."""
    command = [sys.executable, "-m", "mlx_moecache.server", "--model", str(folder), "--port", "0", "--exact", "--quiet"]
    process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            found = re.search(r"http://[^ ]*:(\d+)/v1", line)
            if found:
                break
        else:
            raise mlx_moecache.errors.UsageError("the server did not start; try its flags by hand")
        yield int(found[1])
    finally:
        process.terminate()
        process.wait()


def compare(what: str, generate: Callable[[], Reply], other: Callable[[], Reply], rounds: int, show: bool) -> Result:
    """Rounds of generate, other, other, generate, after one untimed round."""
    generate(), other()
    times, texts, n = [], set(), 1
    for _ in tqdm(range(rounds), desc=what, unit="round", disable=None if show else True):
        replies = [generate(), other(), other(), generate()]
        times.append([seconds for seconds, _, _ in replies])
        texts |= {text for _, _, text in replies}
        n = replies[0][1] - 1
    t = np.array(times)
    ratios = t[:, [0, 3]].sum(axis=1) / t[:, [1, 2]].sum(axis=1)
    return Result(
        what=what,
        ratio=bootstrap(ratios, median),
        fastest_ratio=bootstrap(t, fastest_ratio),
        spread=(float(np.quantile(ratios, 0.25)), float(np.quantile(ratios, 0.75))),
        generate_tps=n / median(t[:, [0, 3]]),
        other_tps=n / median(t[:, [1, 2]]),
        same_text=len(texts) == 1,
        rounds=rounds,
    )


def fastest_ratio(times: Array) -> float:
    """Ratio of the times [N, 4] that the machine's other work disturbed least."""
    return float(np.quantile(times[:, [0, 3]], FASTEST) / np.quantile(times[:, [1, 2]], FASTEST))


def measure(
    folder: Path, *, slots: int | None, memory: str | None, tokens: int, rounds: int, show: bool
) -> list[Result]:
    """The server against generate, and generate against itself."""
    chosen = {"slots": slots} if slots is not None else {"memory": memory}
    model, tokenizer = mlx_moecache.load(str(folder), routing="original", **chosen)
    prompt = tokenizer.encode(PROMPT)
    with open(os.devnull, "w") as nowhere, serving(folder, [f"--{k}={v}" for k, v in chosen.items() if v]) as port:

        def generate() -> Reply:
            moments, pieces, n = [], [], 0
            for r in mlx_moecache.stream_generate(model, tokenizer, prompt, max_tokens=tokens):
                print(r.text, end="", flush=True, file=nowhere)
                n = r.generation_tokens
                if r.text:
                    moments.append(time.perf_counter())
                    pieces.append(r.text)
            return moments[-1] - moments[0], n, "".join(pieces)

        return [
            compare("server", generate, lambda: through_server(port, tokens), rounds, show),
            compare("control", generate, generate, rounds, show),
        ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Decode speed through the server against generate.")
    add_model_argument(parser)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--slots", type=positive, help="experts per layer in memory (default: 30)")
    size.add_argument("--memory", metavar="SIZE", help="budget instead of slots (default: none)")
    parser.add_argument("--tokens", type=positive, default=80, help="of a reply (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=30, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the line of JSON only")
    args = parser.parse_args(argv)
    folder, name = model_folder(args.model)
    slots = 30 if args.slots is None and args.memory is None else args.slots
    before = environment()
    results = measure(
        folder, slots=slots, memory=args.memory, tokens=args.tokens, rounds=args.rounds, show=not args.json
    )
    if not args.json:
        print("\n".join(table(results)))
    record = {
        "benchmark": "server_speed",
        "environment": before,
        "model": name,
        "slots": slots,
        "memory": args.memory,
        "tokens": args.tokens,
        "target": TARGET,
        "results": [asdict(r) for r in results],
    }
    print(json.dumps(record, allow_nan=False))


def table(results: Sequence[Result]) -> list[str]:
    """The lines of the report: the server, the control, and whether the target is met."""
    lines = []
    for r in results:
        low, high = r.spread
        same = "same text" if r.same_text else "TEXTS DIFFER"
        lines.append(
            f"{r.what:8} {r.ratio.format()} of generate's speed (quartiles {low:.3f} to {high:.3f}), "
            f"fastest {r.fastest_ratio.format()}, {r.rounds} rounds: "
            f"{r.other_tps:.1f} against {r.generate_tps:.1f} tok/s, {same}"
        )
    return [*lines, f"target {TARGET}: {verdict(results[0])}"]


def verdict(r: Result) -> str:
    """Whether the interval reaches the target."""
    if r.ratio.high - r.ratio.low > TELLING:
        return "too noisy to tell, use more rounds"
    return "met" if r.ratio.high >= TARGET else "NOT met"


if __name__ == "__main__":
    sys.exit(run(main))
