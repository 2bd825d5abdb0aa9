"""Turn a trained demo model into the checkpoint that ships: mlx-lm layout, affine 4-bit in groups of 64.

    python scripts/demo_export.py RUN_FOLDER [--to FOLDER]

RUN_FOLDER is the --out of train_demo_model.py; its last checkpoint is taken, finished or not. The result is
written only after mlx-lm's own loader has opened it and generated from it. Needs mlx-lm and PyTorch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx_lm
import numpy as np
from demo_data import SPECIALS
from mlx import nn
from mlx_lm.models.qwen2_moe import Model, ModelArgs
from mlx_lm.utils import quantize_model, save_config, save_model

if TYPE_CHECKING:
    from demo_torch import DemoModel

BITS, GROUP_SIZE = 4, 64
SIZE_LIMIT = 16_000_000  # bytes of the whole folder
LOGIT_TOLERANCE = 0.01  # mean difference to PyTorch over the logits' spread; a GPU's short floats need some
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
PROBE = "Once upon a time there was a little dog named Max. He liked to play with his ball in the garden."


class ExportError(Exception):
    """No checkpoint was written; the message is one line that says why."""


def mlx_config(config: dict[str, Any]) -> dict[str, Any]:
    """The qwen2_moe config.json of the fields of DemoConfig."""
    return {
        **config,
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_key_value_heads": config["num_attention_heads"],
        "intermediate_size": config["moe_intermediate_size"] * config["num_experts_per_tok"],  # of no layer
        "norm_topk_prob": False,
        "tie_word_embeddings": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "bos_token_id": None,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }


def mlx_name(name: str) -> str:
    """'layers.0.mlp.gate_proj' (stacked experts) -> 'model.layers.0.mlp.switch_mlp.gate_proj.weight'."""
    if name.endswith((".mlp.gate_proj", ".mlp.up_proj", ".mlp.down_proj")):
        block, projection = name.rsplit(".", 1)
        name = f"{block}.switch_mlp.{projection}.weight"
    return name if name.startswith("lm_head.") else f"model.{name}"


def convert(state: dict[str, np.ndarray], config: dict[str, Any]) -> Model:
    """mlx-lm's model with the float32 weights of a DemoModel's state dict. Raises ExportError."""
    model = Model(ModelArgs.from_dict(mlx_config(config)))
    try:
        weights = [(mlx_name(k), mx.array(v.astype(np.float32))) for k, v in state.items()]
        model.load_weights(weights, strict=True)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ExportError(f"the weights do not fit the configuration: {reason}") from error
    mx.eval(model.parameters())
    return model


def is_quantised(path: str, module: nn.Module) -> bool:
    """Everything but the routers: they are tiny, and their ranking decides which experts run."""
    return not path.endswith((".gate", ".shared_expert_gate"))


def write_checkpoint(model: Model, config: dict[str, Any], tokenizer: Path, to: Path) -> None:
    """Quantise `model`, check it, and put it into the folder `to` with the tokenizer files of `tokenizer`.

    Files of other names in `to` are kept. Raises ExportError; `to` is then as it was.
    """
    missing = [name for name in TOKENIZER_FILES if not (tokenizer / name).is_file()]
    if missing:
        raise ExportError(f"{tokenizer} has no {', '.join(missing)}; give the --out of the training run")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent) as staged:
        stage = Path(staged)
        with redirect_stdout(sys.stderr):  # mlx-lm reports the bits per weight
            model, quantised = quantize_model(model, mlx_config(config), GROUP_SIZE, BITS, quant_predicate=is_quantised)
        save_model(stage, model)
        (stage / "model.safetensors.index.json").unlink()  # one file needs no index
        save_config(quantised, stage / "config.json")
        # A reply also ends where the model would open another turn, so that no special token is ever shown.
        ends = {"eos_token_id": list(range(len(SPECIALS)))}
        (stage / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
        for name in TOKENIZER_FILES:
            shutil.copy(tokenizer / name, stage)
        check_size(stage)
        check_loads(stage)
        to.mkdir(exist_ok=True)
        for path in stage.iterdir():
            os.replace(path, to / path.name)


def check_size(folder: Path) -> None:
    size = sum(p.stat().st_size for p in folder.iterdir())
    if size > SIZE_LIMIT:
        raise ExportError(f"the checkpoint has {size:,} bytes, more than {SIZE_LIMIT:,}; shrink the model")


def check_loads(folder: Path) -> None:
    """Open `folder` with mlx-lm's own loader and generate eight tokens."""
    model, tokenizer = mlx_lm.load(str(folder))
    ids = mx.array([tokenizer.encode(PROBE)])
    if not mx.isfinite(model(ids)).all().item():
        raise ExportError("the quantised model gives logits that are not finite")
    replies = list(mlx_lm.stream_generate(model, tokenizer, PROBE, max_tokens=8))
    if not replies or not 1 <= replies[-1].generation_tokens <= 8:
        raise ExportError("the quantised model generates nothing")


def logit_difference(reference: DemoModel, model: Model, ids: list[int]) -> float:
    """Mean absolute difference of the two models' logits over one sequence, divided by their spread."""
    import torch

    reference.eval()
    device = next(reference.parameters()).device
    with torch.no_grad():
        expected = reference(torch.tensor([ids], device=device))[0].cpu().numpy()
    return float(np.abs(expected - np.array(model(mx.array([ids])))).mean() / expected.std())


def export(model: DemoModel, config: dict[str, Any], out: Path, to: Path | None = None) -> Path:
    """Write the checkpoint of `model` to the folder `to` (default ``out/mlx_model``) and return that folder.

    `config` holds the fields of DemoConfig; `out` is the training run's folder, with the tokenizer files.
    Raises ExportError, also when mlx-lm's logits are not those of PyTorch.
    """
    to = to or out / "mlx_model"
    converted = convert({k: v.detach().cpu().numpy() for k, v in model.state_dict().items()}, config)
    ids = np.random.default_rng(0).integers(config["vocab_size"], size=64).tolist()
    difference = logit_difference(model, converted, ids)
    if not difference < LOGIT_TOLERANCE:
        raise ExportError(f"logits of the conversion differ from PyTorch's by {difference:.3g} of their spread")
    write_checkpoint(converted, config, out, to)
    return to


def load_run(run: Path) -> DemoModel:
    """The model of the run's last checkpoint. Raises ExportError."""
    try:
        import torch
        from demo_torch import DemoConfig, DemoModel
    except ModuleNotFoundError as error:
        raise ExportError(f"needs {error.name}; install it with: pip install -e '.[train]'") from error
    path = run / "checkpoint.pt"
    if not path.is_file():
        raise ExportError(f"no {path}; give the --out folder of a training run that has saved a checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = DemoModel(DemoConfig(**state.get("config", {})))
        model.load_state_dict(state["model"])
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ExportError(f"cannot read {path} ({type(error).__name__})") from error
    print(f"{path}: step {state['step']:,}", file=sys.stderr)
    return model


def setup_arg_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("run", type=Path, help="the --out folder of train_demo_model.py")
    p.add_argument("--to", type=Path, help="folder for the checkpoint (default: RUN/mlx_model)")
    return p


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = setup_arg_parser().parse_args(argv)
    try:
        model = load_run(args.run)
        folder = export(model, asdict(model.config), args.run, args.to)
    except (ExportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(p.stat().st_size for p in folder.iterdir())
    print(f"wrote {folder} ({size / 1e6:.2f} MB)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
