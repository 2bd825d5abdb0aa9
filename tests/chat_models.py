"""A tiny checkpoint that has a chat template and marks of reasoning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tiny_models import Shelf

TEMPLATE = (
    "{% for m in messages %}{% if m['content'] == 'REFUSE' %}{{ raise_exception('no such role here') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_checkpoint(shelf: Shelf, *, opens_thought: bool = False) -> Path:
    """The tiny qwen2_moe with a template, made once. opens_thought: its replies begin inside of a reasoning mark."""
    folder = shelf.folder / ("chat-thinking" if opens_thought else "chat")
    if folder.exists():
        return folder
    shutil.copytree(shelf.checkpoint("qwen2_moe"), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for n, mark in enumerate(("<think>", "</think>"), start=257):
        added = {"id": n, "content": mark, "special": False, "normalized": False}
        tokenizer["added_tokens"].append({**added, "single_word": False, "lstrip": False, "rstrip": False})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings["chat_template"] = (
        TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}") if (opens_thought) else TEMPLATE
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
