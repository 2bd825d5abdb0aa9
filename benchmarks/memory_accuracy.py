"""Is the memory budget kept, and how close is the plan to what is really used?

    python benchmarks/memory_accuracy.py                  the demo model
    python benchmarks/memory_accuracy.py --synthetic 5    5 layers of the shapes of Qwen1.5-MoE-A2.7B, 4-bit, 2 GB

Every setting runs in a process of its own: load, answer a random prompt to the last token that was planned for, with
the most expensive sampling. *measured* is MLX's peak since before loading plus our host buffers; *plan/measured* above
1 means that the plan, its overhead left out, reserved more than was used; *footprint* is what the process grew by, as
the system counts it.
Weights of the synthetic model are a hole in a file except for its embedding, norms and routers: memory does not depend
on their values.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from common import environment, positive, run
from mlx_lm.sample_utils import make_sampler
from speed_checkpoints import QWEN, fill, tensors_of

from mlx_moecache import system
from mlx_moecache.budget import format_bytes, parse_memory
from mlx_moecache.checkpoints.skeleton import write_sparse
from mlx_moecache.demo import DEMO_NAME, demo_model
from mlx_moecache.errors import BudgetError, UsageError
from mlx_moecache.generation import stream_generate
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel

TARGET = 0.05  # of the measured peak, by which the plan may be off


@dataclass(frozen=True)
class Setting:
    """Of one run: the budget (bytes), tokens of the prompt and of the reply."""

    budget: int
    prompt: int
    reply: int


@dataclass(frozen=True)
class Measured:
    """Bytes, except for what says otherwise."""

    budget: int
    prompt: int  # tokens
    reply: int  # tokens
    slots: int  # per layer
    chunk: int  # tokens
    plan: dict[str, int]
    planned: int  # overhead included
    peak: int  # MLX's and host buffers
    footprint: int | None  # growth of the process since before loading, at its peak

    @property
    def ratio(self) -> float:
        """Like with like: MLX and host buffers on both sides."""
        return (self.planned - self.plan["overhead"]) / self.peak

    @property
    def keeps_budget(self) -> bool:
        return max(self.peak, self.footprint or 0) <= self.budget


def measure(folder: Path, setting: Setting) -> Measured:
    """Load and generate in this process, which must be a fresh one."""
    opened = OpenedModel(folder)
    options = MemoryOptions(
        memory=setting.budget, max_context=setting.prompt + setting.reply, max_prompt=setting.prompt
    )
    before = system.process_footprint()
    system.reset_peak_footprint()
    mx.reset_peak_memory()
    model = opened.load(options, CacheOptions())
    plan, cache = model.memory_plan, model.expert_cache
    vocabulary = int(opened.config["vocab_size"])
    prompt = np.random.default_rng(0).integers(1, vocabulary, setting.prompt).tolist()
    responses = stream_generate(
        model,
        Tokenizer(),  # type: ignore[arg-type]
        prompt,
        max_tokens=setting.reply,
        sampler=make_sampler(temp=0.8, top_p=0.9, top_k=40, min_p=0.01),
    )
    for _ in responses:
        pass
    peak, footprint = mx.get_peak_memory() + cache.reader.host_buffer_bytes, system.peak_footprint()
    return Measured(
        setting.budget,
        setting.prompt,
        setting.reply,
        max(cache.slots_per_layer),
        plan.prefill_step_size,
        plan.parts(),
        plan.total,
        peak,
        None if footprint is None or before is None else footprint - before,
    )


class Tokenizer:
    """Enough of a tokenizer for a reply that nobody reads and that never ends early."""

    eos_token_ids: tuple[int, ...] = ()
    last_segment = ""

    @property
    def detokenizer(self) -> Tokenizer:
        return self

    def add_token(self, token: int) -> None:
        pass

    def finalize(self) -> None:
        pass


def settings(folder: Path, prompt: int, reply: int) -> list[Setting]:
    """The smallest budget, two between, and one in which all experts are resident."""
    opened = OpenedModel(folder)
    options = MemoryOptions(memory=1, max_context=prompt + reply, max_prompt=prompt)
    try:
        opened.plan(options)
        raise AssertionError("one byte cannot be enough")
    except BudgetError as error:
        found = re.search(r"smallest that works is ([\d.]+ [KMG]?B) \(", str(error))
    assert found is not None
    least = parse_memory(found[1], physical=0, recommended=None)
    experts = sum(x.num_experts * x.bytes_per_expert for x in opened.layer_shapes)
    return [
        Setting(b, prompt, reply) for b in (least, least + experts // 4, least + experts // 2, 3 * (least + experts))
    ]


@contextmanager
def synthetic(layers: int) -> Iterator[Path]:
    """A checkpoint of so many layers in a temporary folder. Raises OSError if it does not fit there."""
    with tempfile.TemporaryDirectory(prefix="memory_accuracy-") as name:
        folder = Path(name)
        config = {**QWEN, "num_hidden_layers": layers}
        (folder / "config.json").write_text(json.dumps(config))
        tensors = tensors_of(QWEN, layers)
        shard = folder / "model.safetensors"
        write_sparse(shard, tensors)
        fill(shard, tensors)
        yield folder


def in_fresh_process(folder: Path, setting: Setting) -> Measured:
    """Raises UsageError if the run fails."""
    command = [sys.executable, __file__, "--folder", str(folder), "--one", json.dumps(asdict(setting))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(
            f"the run with a budget of {format_bytes(setting.budget)} failed: {done.stderr.strip()[-300:]}"
        )
    return Measured(**json.loads(done.stdout))


def table(results: list[Measured]) -> list[str]:
    heads = f"{'budget':>10} {'prompt':>7} {'reply':>6} {'slots':>6} {'plan':>9} {'measured':>9}"
    lines = [f"{heads} {'plan/measured':>14} {'footprint':>10}"]
    for m in results:
        verdict = "" if abs(m.ratio - 1) <= TARGET else "  beyond 5 %"
        verdict += "" if m.keeps_budget else "  ABOVE THE BUDGET"
        footprint = "-" if m.footprint is None else format_bytes(m.footprint)
        lines.append(
            f"{format_bytes(m.budget):>10} {m.prompt:>7,} {m.reply:>6,} {m.slots:>6} {format_bytes(m.planned):>9} "
            f"{format_bytes(m.peak):>9} {m.ratio:>14.3f} {footprint:>10}{verdict}"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synthetic", type=positive, metavar="LAYERS", help="measure the synthetic model instead")
    parser.add_argument("--prompt", type=positive, nargs="+", default=[8, 600], help="tokens (default: 8 and 600)")
    parser.add_argument("--reply", type=positive, default=40, help="tokens (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the line of JSON only")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(asdict(measure(args.folder, Setting(**json.loads(args.one))))))
        return
    before = environment()
    with synthetic(args.synthetic or 1) as made:
        folder = made if args.synthetic else demo_model()
        name = f"synthetic, {args.synthetic} layers" if args.synthetic else DEMO_NAME
        results: list[Measured] = []
        for prompt in args.prompt:
            for setting in settings(folder, prompt, args.reply):
                results.append(in_fresh_process(folder, setting))
                if not args.json:
                    print("\n".join(table(results)[-1:] if len(results) > 1 else table(results)), flush=True)
    off = [m for m in results if abs(m.ratio - 1) > TARGET]
    if not args.json:
        print(f"{name}: {len(results) - len(off)} of {len(results)} plans within {TARGET:.0%} of the measured peak")
        print("budget kept in all" if all(m.keeps_budget for m in results) else "a budget was exceeded")
    record: dict[str, Any] = {
        "benchmark": "memory_accuracy",
        "environment": before,
        "model": name,
        "target": TARGET,
        "results": [asdict(m) for m in results],
    }
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run(main))
