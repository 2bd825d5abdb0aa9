"""The scripts that make the bundled demo model: text, training, export, evaluation. Tiny models, no network."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import signal
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx import nn
from mlx.utils import tree_flatten
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import demo_data
import demo_export
import evaluate_demo_model

TINY = {  # the fields of DemoConfig
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1100,
}
MARKER = "zyzzyva"  # a word of the held-out tails only
STORY = "Once upon a time a {0} had a red ball. The {0} ran to the park and the {0} was happy. Story {1}."
ANIMALS = ("dog", "cat", "hen", "fox", "owl", "pig", "bee", "ant")


def story(i: int) -> str:
    return STORY.format(ANIMALS[i % len(ANIMALS)], i)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of 100 stories and one of a single long book; MARKER fills what must be held out."""
    folder = tmp_path_factory.mktemp("text")
    stories = [story(i) for i in range(97)] + [f"The {MARKER} ran and the {MARKER} was a happy {MARKER}."] * 5
    (folder / "stories.txt").write_text("<|endoftext|>\n".join(stories), encoding="utf-8")
    lines = [f"It was the {i}th day of a long journey over the sea." for i in range(400)]
    tail = [f"And then the {MARKER} came." for _ in range(10)]
    (folder / "book.txt").write_text("\n".join(lines + tail), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def sources(text: Path) -> list[demo_data.Source]:
    return demo_data.read_sources(text)


@pytest.fixture(scope="module")
def tokenizer(sources: list[demo_data.Source]) -> Tokenizer:
    return demo_data.train_tokenizer(sources, 320)


@pytest.fixture(scope="module")
def tokenizer_folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    demo_data.save_tokenizer(tokenizer, folder, 1100)
    return folder


def random_state(c: dict[str, Any]) -> dict[str, np.ndarray]:
    """A DemoModel's state dict of random weights, written down here because PyTorch may be absent."""
    D, E, inner, shared = (
        c[k] for k in ("hidden_size", "num_experts", "moe_intermediate_size", "shared_expert_intermediate_size")
    )
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (c["vocab_size"], D),
        "lm_head.weight": (c["vocab_size"], D),
        "norm.weight": (D,),
    }
    for i in range(c["num_hidden_layers"]):
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (D,),
            "post_attention_layernorm.weight": (D,),
            "self_attn.o_proj.weight": (D, D),
            "mlp.gate.weight": (E, D),
            "mlp.gate_proj": (E, inner, D),
            "mlp.up_proj": (E, inner, D),
            "mlp.down_proj": (E, D, inner),
            "mlp.shared_expert_gate.weight": (1, D),
            "mlp.shared_expert.gate_proj.weight": (shared, D),
            "mlp.shared_expert.up_proj.weight": (shared, D),
            "mlp.shared_expert.down_proj.weight": (D, shared),
        }
        for p in "qkv":
            layer |= {f"self_attn.{p}_proj.weight": (D, D), f"self_attn.{p}_proj.bias": (D,)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    rng = np.random.default_rng(0)
    return {k: rng.normal(scale=0.1, size=s).astype(np.float32) for k, s in shapes.items()}


@pytest.fixture(scope="module")
def checkpoint(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported checkpoint of random weights, in a folder that held a model card before."""
    to = tmp_path_factory.mktemp("exported") / "model"
    to.mkdir()
    (to / "README.md").write_text("card")
    demo_export.write_checkpoint(demo_export.convert(random_state(TINY), TINY), TINY, tokenizer_folder, to)
    return to


# --- text ---


def test_last_three_percent_of_stories_are_held_out_in_whole_documents(text: Path) -> None:
    book, stories = demo_data.read_sources(text)
    assert (book.name, stories.name) == ("book", "stories")
    docs = [d.strip() for d in (text / "stories.txt").read_text().split("<|endoftext|>")]
    assert stories.train + stories.held_out == docs
    held = sum(map(len, stories.held_out))
    share = 0.03 * sum(map(len, docs))
    assert share <= held < share + len(stories.held_out[0]) + 1
    assert stories.is_stories and not book.is_stories


def test_a_book_is_cut_at_a_line_and_keeps_its_head_for_training(text: Path) -> None:
    book, _ = demo_data.read_sources(text)
    whole = (text / "book.txt").read_text()
    assert len(book.train) == len(book.held_out) == 1
    assert book.train[0] + "\n" + book.held_out[0] == whole
    assert 0.03 * len(whole) <= len(book.held_out[0]) + 1 < 0.03 * len(whole) + 80


def no_folder(folder: Path) -> None:
    folder.rmdir()


def no_text(folder: Path) -> None:
    (folder / "notes.md").write_text("x")


def latin_1(folder: Path) -> None:
    (folder / "a.txt").write_bytes("café au lait".encode("latin-1"))


def one_story(folder: Path) -> None:
    (folder / "a.txt").write_text("The end. " * 20)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [(no_folder, "no folder"), (no_text, "no *.txt"), (latin_1, "not UTF-8"), (one_story, "too short")],
)
def test_an_unusable_text_folder_is_named_in_one_line(tmp_path: Path, spoil: Callable[[Path], None], says: str) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    spoil(folder)
    with pytest.raises(demo_data.TextError) as caught:
        demo_data.read_sources(folder)
    assert says in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_the_tokenizer_has_not_seen_the_held_out_words(sources: list[demo_data.Source]) -> None:
    tokenizer = demo_data.train_tokenizer(sources, 600)
    assert [tokenizer.token_to_id(t) for t in demo_data.SPECIALS] == [0, 1, 2]
    assert len(tokenizer.encode(" ball").tokens) == 1
    assert len(tokenizer.encode(f" {MARKER}").tokens) >= 5


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_text_survives_the_tokenizer_up_to_unicode_composition(tokenizer: Tokenizer, string: str) -> None:
    ids = tokenizer.encode(string, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", string)


def test_batches_depend_on_seed_and_step_only_and_never_show_held_out_text(
    sources: list[demo_data.Source], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    first = demo_data.Batches(sources, tokenizer, tmp_path, seed=3)
    forward = [first(step, 4, 128, 0.25) for step in range(12)]
    again = demo_data.Batches(sources, tokenizer, tmp_path, seed=3)
    backward = [again(step, 4, 128, 0.25) for step in reversed(range(12))][::-1]
    other = demo_data.Batches(sources, tokenizer, tmp_path, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not np.array_equal(forward[0], forward[1])
    assert not np.array_equal(forward[0], other(0, 4, 128, 0.25))
    assert forward[0].shape == (4, 129)
    shown = " ".join(tokenizer.decode(row, skip_special_tokens=False) for batch in forward for row in batch.tolist())
    assert MARKER not in shown
    assert "journey" in shown and "<|user|>" in shown and "<|assistant|>" in shown


def test_a_book_shorter_than_a_window_is_refused_with_its_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    book = demo_data.Source("novella", ["word " * 1300], ["end"])
    batches = demo_data.Batches([book], tokenizer, tmp_path, seed=0)
    with pytest.raises(demo_data.TextError, match="novella"):
        batches(0, 1, 10_000, 0.0)


def test_a_write_that_fails_leaves_no_token_cache(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(path: Path, array: np.ndarray) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    cache = tmp_path / "a.train.npy"
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(np, "save", full_disk)
        demo_data.encode_cached(["a story"], tokenizer, cache)
    stream = demo_data.encode_cached(["a story"], tokenizer, cache)
    assert stream[-1] == 0 and np.array_equal(stream, np.load(cache))


def test_a_run_folder_made_from_other_text_is_refused(tmp_path: Path) -> None:
    folder, out = tmp_path / "text", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    (folder / "a.txt").write_text("one")
    demo_data.pin_text(folder, out)
    demo_data.pin_text(folder, out)
    (folder / "a.txt").write_text("two")
    with pytest.raises(demo_data.TextError, match="other text"):
        demo_data.pin_text(folder, out)


@pytest.mark.parametrize(("given_text", "count"), [("4096", 4096), ("12M", 12_000_000), ("1.5k", 1500)])
def test_counts_may_have_units(given_text: str, count: int) -> None:
    assert demo_data.parse_count(given_text) == count


@pytest.mark.parametrize("given_text", ["", "M", "many", "-5", "0", "infM", "nank"])
def test_a_count_that_is_none_is_refused(given_text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        demo_data.parse_count(given_text)


# --- export ---


def test_experts_are_stacked_and_quantised_and_routers_are_not(checkpoint: Path) -> None:
    weights: dict[str, mx.array] = mx.load(str(checkpoint / "model.safetensors"))
    switch = "model.layers.1.mlp.switch_mlp.down_proj"
    assert weights[f"{switch}.weight"].dtype == mx.uint32
    assert weights[f"{switch}.weight"].shape == (8, 64, 64 * 4 // 32)
    assert weights[f"{switch}.scales"].shape == weights[f"{switch}.biases"].shape == (8, 64, 1)
    assert weights[f"{switch}.scales"].dtype == mx.float32
    for router in ("gate", "shared_expert_gate"):
        assert weights[f"model.layers.0.mlp.{router}.weight"].dtype == mx.float32
        assert f"model.layers.0.mlp.{router}.scales" not in weights
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert config["eos_token_id"] == 0
    assert not (checkpoint / "model.safetensors.index.json").exists()
    assert (checkpoint / "README.md").read_text() == "card"


def test_every_weight_arrives_where_it_belongs() -> None:
    state = random_state(TINY)
    weights = dict(tree_flatten(demo_export.convert(state, TINY).parameters()))
    assert len(weights) == len(state)
    for name, value in state.items():
        assert np.array_equal(np.array(weights[demo_export.mlx_name(name)]), value), name


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(demo_export.ExportError, match="do not fit"):
        demo_export.convert(random_state({**TINY, "num_experts": 6}), TINY)


def test_too_large_a_checkpoint_changes_nothing(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "model"
    to.mkdir()
    (to / "model.safetensors").write_text("old")
    monkeypatch.setattr(demo_export, "SIZE_LIMIT", 10_000)
    with pytest.raises(demo_export.ExportError, match="more than 10,000"):
        demo_export.write_checkpoint(demo_export.convert(random_state(TINY), TINY), TINY, tokenizer_folder, to)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert {p.name: p.read_text() for p in to.iterdir()} == {"model.safetensors": "old"}


def test_a_run_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(demo_export.ExportError, match=r"no tokenizer\.json"):
        demo_export.write_checkpoint(demo_export.convert(random_state(TINY), TINY), TINY, tmp_path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_export_of_a_run_without_a_checkpoint_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo_export.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_chat_template_puts_system_text_and_turns_in_training_form(checkpoint: Path) -> None:
    _, tokenizer = mlx_lm.load(str(checkpoint))
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "A story about a dog, please."},
    ]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    assert tokenizer.decode(ids) == (
        "Be kind.<|endoftext|><|user|>Hi<|assistant|>Hello.<|endoftext|>"
        "<|user|>A story about a dog, please.<|assistant|>"
    )
    assert tokenizer.eos_token_id == 0 and ids[-1] == 2


@pytest.mark.parametrize("special", [0, 1, 2])
def test_a_special_token_ends_the_stream_and_is_not_shown(checkpoint: Path, special: int) -> None:
    model, tokenizer = mlx_lm.load(str(checkpoint))
    planned = iter([*tokenizer.encode(" a dog", add_special_tokens=False), special])

    def sampler(logprobs: mx.array) -> mx.array:
        return mx.array([next(planned, special)])

    replies = list(mlx_lm.stream_generate(model, tokenizer, "The", max_tokens=12, sampler=sampler))
    assert replies[-1].finish_reason == "stop"
    assert "".join(r.text for r in replies).strip() == "a dog"


def test_streamed_text_has_the_spaces_of_the_original(checkpoint: Path) -> None:
    _, tokenizer = mlx_lm.load(str(checkpoint))
    string = "Tom said: “I'm 7!”  Two  spaces.\n\nNaïve café, é 中 😀 end"
    streamer, shown = tokenizer.detokenizer, ""
    for i in tokenizer.encode(string):
        streamer.add_token(i)
        shown += streamer.last_segment
    streamer.finalize()
    assert shown + streamer.last_segment == string


# --- evaluation ---


@given(length=st.integers(514, 6000), limit=st.integers(1, 6000))
@settings(max_examples=60, deadline=None)
def test_windows_predict_no_token_twice(length: int, limit: int) -> None:
    ids = evaluate_demo_model.windows(range(length), limit)
    predicted = ids[:, 1:].flatten()
    assert ids.shape[1] == 513 and len(ids) <= max(1, limit // 512)
    assert len(set(predicted.tolist())) == len(predicted)
    assert predicted.max() < length


def test_a_model_that_knows_nothing_scores_the_size_of_its_vocabulary(checkpoint: Path, tmp_path: Path) -> None:
    _, tokenizer = mlx_lm.load(str(checkpoint))
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(story(i) for i in range(1000)), encoding="utf-8")

    def uniform(x: mx.array) -> mx.array:
        return mx.zeros((*x.shape, 320))

    (score,) = evaluate_demo_model.evaluate(uniform, tokenizer, tmp_path, limit=1024)
    assert score.tokens in (512, 1024)
    assert score.nats_per_token == pytest.approx(math.log(320), rel=1e-5)
    assert score.perplexity == pytest.approx(320, rel=1e-4)
    assert score.nats_per_character == pytest.approx(math.log(320) * score.tokens / score.characters, rel=1e-5)
    assert "<|endoftext|>" not in tokenizer.decode([0], skip_special_tokens=True)


def test_standard_error_is_over_windows() -> None:
    score = evaluate_demo_model.score("a", [1.0, 2.0, 3.0], characters=512)
    assert score.nats_per_token == 2.0 and score.nats_per_character == 6.0
    assert score.nats_per_token_se == pytest.approx(1 / math.sqrt(3))
    assert score.perplexity_se == pytest.approx(math.exp(2) / math.sqrt(3))
    assert evaluate_demo_model.score("a", [1.0], 512).perplexity_se is None


def test_evaluation_command_prints_valid_json(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(story(i) for i in range(700)), encoding="utf-8")
    assert evaluate_demo_model.main([str(checkpoint), str(tmp_path), "--limit", "512", "--json"]) == 0
    result = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert result["scores"][0]["tokens"] == 512 and set(result["text_sha256"]) == {"a.txt"}
    assert result["scores"][0]["nats_per_token"] > 0


@pytest.mark.parametrize("wrong", ["model", "text"])
def test_evaluation_command_names_what_is_missing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    model = tmp_path if wrong == "model" else checkpoint
    assert evaluate_demo_model.main([str(model), str(tmp_path / "nowhere")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: no ") and str(tmp_path) in err


# --- training ---


def test_training_without_pytorch_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "train_demo_model", raising=False)
    with pytest.raises(SystemExit) as caught:
        importlib.import_module("train_demo_model")
    assert caught.value.code == 2
    assert ".[train]" in capsys.readouterr().err


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The training script with the tiny configuration; skips without PyTorch."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    import train_demo_model
    from demo_torch import DemoConfig

    monkeypatch.setattr(train_demo_model, "DemoConfig", lambda: DemoConfig(**TINY))
    return train_demo_model


def arguments(text: Path, out: Path, *more: str) -> list[str]:
    """Four steps of 1,024 tokens, the last one in the decay phase."""
    fixed = ["--tokens", "4096", "--batch-tokens", "1024", "--device", "cpu", "--save-every", "1"]
    return [str(text), "--out", str(out), *fixed, *more]


def interrupting(monkeypatch: pytest.MonkeyPatch, trainer: Any, at: int) -> None:
    """Ctrl-C while the batch of step `at` is made."""

    class Interrupting(demo_data.Batches):
        def __call__(self, step: int, *shape: Any) -> np.ndarray:
            if step == at:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(step, *shape)

    monkeypatch.setattr(trainer, "Batches", Interrupting)


def weights_of(run: Path) -> dict[str, np.ndarray]:
    import torch

    state = torch.load(run / "checkpoint.pt", weights_only=True)
    return {k: v.numpy() for k, v in state["model"].items()}


def lively_model(trainer: Any) -> Any:
    """Larger weights than at the start of training: every part of the model moves the logits."""
    import torch

    torch.manual_seed(1)
    model = trainer.DemoModel(trainer.DemoConfig())
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn_like(p) * 0.2)
    return model


def test_mlx_and_pytorch_agree_on_logits(trainer: Any) -> None:
    model = lively_model(trainer)
    converted = demo_export.convert({k: v.numpy() for k, v in model.state_dict().items()}, TINY)
    ids = np.random.default_rng(2).integers(320, size=100).tolist()
    logits = np.array(converted(mx.array([ids])))
    assert logits.std() > 1
    assert demo_export.logit_difference(model, converted, ids) < 1e-4
    converted.model.layers[1].mlp.gate.weight = -converted.model.layers[1].mlp.gate.weight
    assert demo_export.logit_difference(model, converted, ids) > 1e-2


def test_a_conversion_that_changes_the_logits_is_refused(
    trainer: Any, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = lively_model(trainer)
    swap = {".mlp.gate_proj": ".mlp.up_proj", ".mlp.up_proj": ".mlp.gate_proj"}
    right = demo_export.mlx_name

    def wrong(name: str) -> str:
        tail = next((t for t in swap if name.endswith(t)), None)
        return right(name.removesuffix(tail) + swap[tail] if tail else name)

    monkeypatch.setattr(demo_export, "mlx_name", wrong)
    with pytest.raises(demo_export.ExportError, match="differ"):
        demo_export.export(model, TINY, tokenizer_folder, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_training_writes_a_checkpoint_that_stock_mlx_lm_opens(
    trainer: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert trainer.main(arguments(text, run)) == 0
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert set(rows[-1]["held_out"]) == {"book", "stories"}
    model, _ = mlx_lm.load(str(run / "mlx_model"))
    assert isinstance(model.model.layers[0].mlp.gate, nn.Linear)
    assert demo_export.main([str(run), "--to", str(tmp_path / "again")]) == 0
    same = [(p / "model.safetensors").read_bytes() for p in (run / "mlx_model", tmp_path / "again")]
    assert same[0] == same[1]
    assert capsys.readouterr().out == ""


def test_a_run_that_is_interrupted_and_continued_equals_one_that_is_not(
    trainer: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trainer.main(arguments(text, tmp_path / "whole")) == 0
    with monkeypatch.context() as patched:
        interrupting(patched, trainer, at=1)
        assert trainer.main(arguments(text, tmp_path / "parts", "--save-every", "100")) == 130
    assert "stopped at step 2" in capsys.readouterr().err
    assert not (tmp_path / "parts" / "mlx_model").exists()
    assert trainer.main(arguments(text, tmp_path / "parts", "--save-every", "100")) == 0
    assert "continuing at step 2 of 4" in capsys.readouterr().err
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(np.array_equal(whole[k], parts[k]) for k in whole)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_save_that_fails_keeps_the_last_checkpoint(
    trainer: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupting(monkeypatch, trainer, at=0)
    assert trainer.main(arguments(text, tmp_path)) == 130
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full_disk(state: dict[str, Any], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full_disk)
    assert trainer.main(arguments(text, tmp_path)) == 2
    assert "No space left" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--seed", "7"), "--seed 0"),
        (("--tokens", "8k"), "--tokens 4096"),
        (("--batch-tokens", "1000"), "multiple of 1024"),
        (("--tokens", "100"), "less than one step"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    trainer: Any,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    says: str,
) -> None:
    interrupting(monkeypatch, trainer, at=0)
    assert trainer.main(arguments(text, tmp_path)) == 130
    assert trainer.main(arguments(text, tmp_path, *more)) == 2
    assert says in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(
    trainer: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    assert trainer.main(arguments(text, tmp_path)) == 2
    assert demo_export.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("cannot read") == 2


def test_learning_rate_warms_up_holds_and_decays_to_zero(trainer: Any) -> None:
    s = trainer.Settings(tokens=4096 * 1000, batch_tokens=4096, lr=2.0, adamw=False, seed=0)
    assert (s.steps, s.decay_from) == (1000, 550)
    assert s.rate(0) == pytest.approx(0.02) and s.rate(99) == s.rate(550) == 2.0
    assert s.rate(775) == pytest.approx(1.0) and s.rate(999) == pytest.approx(2.0 / 450)


def test_muon_steps_are_orthogonal_and_scaled_like_adamw(trainer: Any) -> None:
    import torch
    from demo_torch import Muon, orthogonalise

    torch.manual_seed(0)
    g = torch.randn(3, 48, 96)
    values = torch.linalg.svdvals(orthogonalise(g))
    assert values.min() > 0.6 and values.max() < 1.3  # five steps give singular values near 1, not at 1
    p = torch.nn.Parameter(torch.zeros(3, 48, 96))
    p.grad = g
    Muon([p], lr=0.1, weight_decay=0.0).step()
    assert 0.1 * 0.2 * 0.6 < p.detach().pow(2).mean().sqrt().item() < 0.1 * 0.2 * 1.3


def test_tiny_configuration_names_every_field(trainer: Any) -> None:
    assert asdict(trainer.DemoConfig()) == TINY
