"""Train the bundled demo model from a folder of texts, then write it as a 4-bit mlx-lm checkpoint.

    python scripts/train_demo_model.py TEXT_FOLDER --out runs/demo --tokens 100M

The folder holds ``*.txt`` files with ``<|endoftext|>`` between documents. Everything the run makes stands in
--out; the same command again continues from its last checkpoint. Ctrl-C saves and stops.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from demo_data import (
    Batches,
    TextError,
    encode_cached,
    parse_count,
    pin_text,
    read_sources,
    save_tokenizer,
    train_tokenizer,
)
from tokenizers import Tokenizer
from tqdm import tqdm

try:
    import torch
    import torch.nn.functional as F
    from demo_torch import DemoConfig, DemoModel, Muon
except ModuleNotFoundError as missing:
    if missing.name != "torch":
        raise
    print("error: training needs PyTorch; install it with: pip install -e '.[train]'", file=sys.stderr)
    raise SystemExit(2) from None

WARMUP_STEPS = 100
DECAY_SHARE = 0.45  # of the steps, at the end: linear decay to zero, longer context, more stories
CONTEXT, DECAY_CONTEXT = 512, 1024
ALPHA, DECAY_ALPHA = 0.25, 0.0  # sources are drawn in proportion to their tokens ** alpha
BALANCE = 0.003  # weight of the balancing loss: light, so that experts specialise and routing has locality


class RunError(Exception):
    """The run cannot start or go on; the message is one line that says what to do."""


@dataclass(frozen=True)
class Settings:
    """What a resumed run must share with its checkpoint, or schedule and batches would not be the same."""

    tokens: int  # of the whole run
    batch_tokens: int  # per step
    lr: float  # peak
    adamw: bool  # instead of Muon for the hidden matrices
    seed: int

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens

    @property
    def decay_from(self) -> int:
        return int((1 - DECAY_SHARE) * self.steps)

    def rate(self, step: int) -> float:
        """Learning rate of the 0-based `step`: linear warm-up, constant, linear decay to zero."""
        decay = min(1.0, (self.steps - step) / (self.steps - self.decay_from))
        return self.lr * min(1.0, (step + 1) / WARMUP_STEPS) * decay


def setup_arg_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("text", type=Path, help="folder of *.txt files")
    p.add_argument("--out", type=Path, required=True, help="folder for tokenizer, checkpoints and model")
    p.add_argument("--tokens", type=parse_count, default=10_000_000, help="training tokens (default 10M)")
    p.add_argument("--batch-tokens", type=parse_count, default=4096, help="tokens per step (default 4096)")
    p.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default 3e-3)")
    p.add_argument("--adamw", action="store_true", help="AdamW for all weights, not Muon for the matrices")
    p.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
    p.add_argument("--save-every", type=parse_count, default=200, help="steps per checkpoint (default 200)")
    p.add_argument("--device", default=None, help="cuda, cpu, ... (default: cuda where there is one)")
    return p


def optimisers(model: DemoModel, lr: float, adamw_only: bool) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, head, routers, norms and biases."""
    hidden: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, p in model.named_parameters():
        plain = p.dim() < 2 or "embed" in name or "lm_head" in name or name.endswith("gate.weight")
        (rest if plain or adamw_only else hidden).append(p)
    matrices, vectors = [p for p in rest if p.dim() >= 2], [p for p in rest if p.dim() < 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
    )
    return [adamw, Muon(hidden, lr=lr)] if hidden else [adamw]


def save_checkpoint(
    path: Path, model: DemoModel, opts: list[torch.optim.Optimizer], step: int, settings: Settings
) -> None:
    """Write beside `path`, then rename: a run that is killed while saving keeps its last checkpoint."""
    state = {
        "model": model.state_dict(),
        "optimisers": [o.state_dict() for o in opts],
        "step": step,
        "config": asdict(model.config),
        "settings": asdict(settings),
    }
    tmp = path.with_suffix(".tmp")
    torch.save(state, tmp)
    os.replace(tmp, path)


def restore(path: Path, model: DemoModel, opts: list[torch.optim.Optimizer], settings: Settings, device: str) -> int:
    """Load `path` into model and optimisers; returns the number of steps done. Raises RunError."""
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise RunError(f"cannot read {path} ({type(error).__name__}); delete it to start anew") from error
    saved = state.get("settings", {})
    for name, value in asdict(settings).items():
        if saved.get(name, value) != value:
            flag = "--" + name.replace("_", "-")
            raise RunError(f"{path} was made with {flag} {saved[name]}; give the same or another --out")
    model.load_state_dict(state["model"])
    for o, s in zip(opts, state["optimisers"], strict=True):
        o.load_state_dict(s)
    return int(state["step"])


@torch.no_grad()
def held_out_loss(model: DemoModel, stream: np.ndarray, device: str, windows: int = 40, length: int = 512) -> float:
    """Mean nats per token over evenly spaced windows of a held-out stream."""
    starts = np.linspace(0, max(0, len(stream) - length - 1), num=windows).astype(int)
    total = 0.0
    for s in starts:
        ids = torch.from_numpy(stream[s : s + length + 1].astype(np.int64)).to(device)[None]
        logits, _ = model(ids[:, :-1])
        total += F.cross_entropy(logits[0], ids[0, 1:]).item()
    return total / windows


@contextmanager
def interrupt_flag() -> Iterator[Event]:
    """An event that the first Ctrl-C sets, so that a step is never left half done; the second one raises."""
    event = Event()
    before = signal.getsignal(signal.SIGINT)

    def handle(signum: int, frame: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def prepare(text: Path, out: Path, config: DemoConfig, seed: int) -> tuple[Batches, dict[str, np.ndarray]]:
    """Training batches and a held-out stream per source; tokenizer and streams are kept in `out`."""
    sources = read_sources(text)
    out.mkdir(parents=True, exist_ok=True)
    pin_text(text, out)
    tok_path = out / "tokenizer.json"
    if not tok_path.exists():
        print("training the tokenizer", file=sys.stderr)
        save_tokenizer(train_tokenizer(sources, config.vocab_size), out, config.max_position_embeddings)
    tok = Tokenizer.from_file(str(tok_path))
    batches = Batches(sources, tok, out, seed)
    held = {s.name: encode_cached(s.held_out, tok, out / f"{s.name}.held_out.npy") for s in sources}
    for s, n in zip(sources, batches.sizes, strict=True):
        kind = "stories" if s.is_stories else "books"
        print(f"{s.name}: {kind}, {n:,} training tokens, {len(held[s.name]):,} held out", file=sys.stderr)
    return batches, held


def train(
    text: Path, out: Path, config: DemoConfig, settings: Settings, device: str, save_every: int
) -> tuple[DemoModel, int]:
    """Train from the last checkpoint in `out`, or anew. Returns the model and the steps done.

    After Ctrl-C these are fewer than asked for. Raises TextError and RunError.
    """
    batches, held = prepare(text, out, config, settings.seed)
    torch.manual_seed(settings.seed)
    model = DemoModel(config).to(device)
    opts = optimisers(model, settings.lr, settings.adamw)
    checkpoint, step, steps = out / "checkpoint.pt", 0, settings.steps
    if checkpoint.exists():
        step = restore(checkpoint, model, opts, settings, device)
        print(f"continuing at step {step:,} of {steps:,}", file=sys.stderr)

    with (
        (out / "log.jsonl").open("a") as log,
        tqdm(total=steps, initial=step, unit="step", disable=None) as bar,
        interrupt_flag() as interrupted,
    ):
        while step < steps and not interrupted.is_set():
            began = time.perf_counter()
            decaying = step >= settings.decay_from
            length = DECAY_CONTEXT if decaying else CONTEXT
            for o in opts:
                for g in o.param_groups:
                    g["lr"] = settings.rate(step)
            data = batches(step, settings.batch_tokens // length, length, DECAY_ALPHA if decaying else ALPHA)
            ids = torch.from_numpy(data).to(device)
            logits, balance = model(ids[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            (loss + BALANCE * balance).backward()
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            if not math.isfinite(loss.item()) or not math.isfinite(norm):
                raise RunError(f"the loss is not finite at step {step:,}; start again with a lower --lr")
            for o in opts:
                o.step()
                o.zero_grad(set_to_none=True)
            step += 1

            rate = settings.batch_tokens / (time.perf_counter() - began)
            row: dict[str, Any] = {"step": step, "loss": loss.item(), "balance": balance.item(), "norm": norm}
            row["tok_s"] = round(rate)
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", balance=f"{balance.item():.2f}", tok_s=f"{rate:,.0f}")
            if bar.disable and step % 50 == 0:  # not a terminal
                print(f"step {step:,}/{steps:,} loss {loss.item():.3f} {rate:,.0f} tok/s", file=sys.stderr)
            if step % save_every == 0 or step == steps:
                save_checkpoint(checkpoint, model, opts, step, settings)
            if step % (5 * save_every) == 0 or step == steps:
                row["held_out"] = {n: round(held_out_loss(model, s, device), 4) for n, s in held.items()}
                tqdm.write(f"step {step:,} held-out nats/token: {row['held_out']}", file=sys.stderr)
            log.write(json.dumps(row) + "\n")
            log.flush()
        if step < steps:
            save_checkpoint(checkpoint, model, opts, step, settings)
    return model, step


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = setup_arg_parser().parse_args(argv)
    settings = Settings(args.tokens, args.batch_tokens, args.lr, args.adamw, args.seed)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if args.batch_tokens % DECAY_CONTEXT:
            raise RunError(f"--batch-tokens {args.batch_tokens} is not a multiple of {DECAY_CONTEXT}")
        if settings.steps < 1:
            raise RunError(f"--tokens {args.tokens} is less than one step; give at least --batch-tokens")
        model, step = train(args.text, args.out, DemoConfig(), settings, device, args.save_every)
    except (TextError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while the text is prepared, or a second Ctrl-C
        print("stopped; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    if step < settings.steps:
        print(f"stopped at step {step:,}; the same command continues from here", file=sys.stderr)
        return 130

    try:
        from demo_export import ExportError, export  # needs mlx-lm; training alone does not
    except ModuleNotFoundError:
        print(f"trained; where mlx-lm is: python scripts/demo_export.py {args.out}", file=sys.stderr)
        return 0
    try:
        folder = export(model, asdict(model.config), args.out)
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {folder}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
