"""Text for the demo model: sources, held-out tails, tokenizer, chat-formatted samples, batches.

Knows files, strings and token ids; does not know the model or the optimiser. A source is one ``*.txt`` file
whose documents are separated by ``<|endoftext|>``. The last 3 % of each source is held out: neither the model
nor the tokenizer is trained on it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

END, USER, ASSISTANT = "<|endoftext|>", "<|user|>", "<|assistant|>"
SPECIALS = [END, USER, ASSISTANT]  # ids 0, 1, 2
HELD_OUT = 0.03  # share of each source, its tail
STORY_CHARS = 6000  # sources whose median document is shorter are stories, the others are books

# A turn is a special token and its text; system text stands before the first turn like a document of its own.
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|endoftext|>"
    "{% else %}{{ m['content'] }}<|endoftext|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class TextError(ValueError):
    """The text folder cannot be used; the message is one line that says what to do."""


@dataclass(frozen=True)
class Source:
    """One text file, split into what is trained on and what is held out."""

    name: str
    train: list[str]
    held_out: list[str]

    @property
    def is_stories(self) -> bool:
        return float(np.median([len(d) for d in self.train])) < STORY_CHARS


def text_files(folder: Path) -> list[Path]:
    """The ``*.txt`` files of `folder` in order of name. Raises TextError when there are none."""
    if not folder.is_dir():
        raise TextError(f"no folder {folder}; give a folder that holds *.txt files")
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        raise TextError(f"no *.txt files in {folder}; give a folder of texts with {END} between documents")
    return paths


def read_sources(folder: Path) -> list[Source]:
    """Read every ``*.txt`` of `folder`; hold out the last 3 % of each by characters, cutting inside a book.

    Raises TextError.
    """
    sources = []
    for path in text_files(folder):
        try:
            docs = [d.strip() for d in path.read_text(encoding="utf-8").split(END)]
        except UnicodeDecodeError as error:
            raise TextError(f"{path} is not UTF-8 at byte {error.start}; convert or remove it") from error
        docs = [d for d in docs if d]
        budget = int(HELD_OUT * sum(map(len, docs)))
        held: list[str] = []
        while budget > 0 and docs:
            tail = docs.pop()
            if len(tail) > budget and len(tail) > STORY_CHARS:  # a book: keep its head for training
                cut = tail.rfind("\n", 0, len(tail) - budget) + 1 or len(tail) - budget
                docs.append(tail[:cut].strip())
                tail = tail[cut:].strip()
            held.insert(0, tail)
            budget -= len(tail)
        if not docs or not held:
            raise TextError(f"{path} is too short to hold out its last 3 %; add text or remove it")
        sources.append(Source(path.stem, docs, held))
    return sources


def text_digests(folder: Path) -> dict[str, str]:
    """sha256 of every text file by name. Raises TextError."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in text_files(folder)}


def pin_text(folder: Path, out: Path) -> None:
    """Write the sha256 of every text file to ``out/sources.json``, or check that it is still the same.

    Tokenizer, token caches and checkpoint in `out` all depend on the text. Raises TextError when it changed.
    """
    digests = text_digests(folder)
    record = out / "sources.json"
    if record.exists() and json.loads(record.read_text(encoding="utf-8")) != digests:
        raise TextError(f"{out} was made from other text than {folder} holds now; choose another --out")
    write_atomically(record, json.dumps(digests, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, path)


def train_tokenizer(sources: list[Source], vocab_size: int) -> Tokenizer:
    """Byte-level BPE on the training part of the sources; stories count as much as books."""
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    # Digits one by one, words with their leading space, runs of punctuation: the usual byte-level split.
    pattern = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    share = min(sum(map(len, s.train)) for s in sources if s.train)

    def texts() -> Iterator[str]:
        for s in sources:
            used, limit = 0, 4 * share
            for d in s.train:
                yield d[: limit - used]
                used += len(d)
                if used >= limit:
                    break

    tok.train_from_iterator(texts(), trainer)
    return tok


def topics(docs: list[str]) -> list[list[str]]:
    """For each story up to four nouns it is about: after an article, frequent here and rare elsewhere."""
    word = re.compile(r"\b(?:a|an|the|his|her|their|my) ([a-z]{3,12})\b")
    found = [Counter(word.findall(d)) for d in docs]
    df = Counter(w for c in found for w in c)
    limit = 0.05 * len(docs)

    def best(counts: Counter[str]) -> list[str]:
        ranked = sorted(counts.items(), key=lambda t: (-t[1] / df[t[0]] ** 0.5, t[0]))
        return [w for w, n in ranked if n >= 2 and df[w] < limit][:4]

    return [best(c) for c in found]


REQUESTS = (
    "Tell me a story about {}.",
    "Write a story about {}.",
    "Can you tell me a story about {}?",
    "Please write a short story about {}.",
    "I want a story about {}.",
    "A story about {}, please.",
)


class StorySampler:
    """Token streams of stories: plain, as the answer to a request, or continuing the user's words."""

    def __init__(self, docs: list[str], tok: Tokenizer) -> None:
        self.docs, self.tok, self.topics = docs, tok, topics(docs)

    def text(self, rng: np.random.Generator) -> str:
        i = int(rng.integers(len(self.docs)))
        doc, kind = self.docs[i], rng.random()
        if kind < 0.35 and self.topics[i]:
            n = min(len(self.topics[i]), int(rng.integers(1, 4)))
            nouns = [("an " if w[0] in "aeiou" else "a ") + w for w in rng.permutation(self.topics[i])[:n]]
            about = nouns[0] if n == 1 else ", ".join(nouns[:-1]) + " and " + nouns[-1]
            return USER + REQUESTS[int(rng.integers(len(REQUESTS)))].format(about) + ASSISTANT + doc + END
        if kind < 0.6:
            spaces = [m.start() for m in re.finditer(" ", doc[:240])]
            if spaces:
                cut = spaces[int(rng.integers(len(spaces)))]
                return USER + doc[:cut] + ASSISTANT + doc[cut:] + END
        return doc + END

    def window(self, length: int, rng: np.random.Generator) -> np.ndarray:
        ids: list[int] = []
        while len(ids) < length:
            ids += self.tok.encode(self.text(rng), add_special_tokens=False).ids
        return np.asarray(ids[:length], dtype=np.int64)


class BookSampler:
    """Random windows of one long token stream."""

    def __init__(self, name: str, stream: np.ndarray) -> None:
        self.name, self.stream = name, stream

    def window(self, length: int, rng: np.random.Generator) -> np.ndarray:
        if len(self.stream) <= length:
            have = len(self.stream)
            raise TextError(f"{self.name} has {have:,} training tokens, a window needs {length + 1:,}")
        start = int(rng.integers(len(self.stream) - length))
        return self.stream[start : start + length].astype(np.int64)


class Batches:
    """Batches that depend on (seed, step) only: a resumed run sees what an uninterrupted one would."""

    def __init__(self, sources: list[Source], tok: Tokenizer, cache: Path, seed: int) -> None:
        self.seed, self.sizes = seed, []
        self.samplers: list[StorySampler | BookSampler] = []
        for s in sources:
            stream = encode_cached(s.train, tok, cache / f"{s.name}.train.npy")
            self.sizes.append(len(stream))
            self.samplers.append(StorySampler(s.train, tok) if s.is_stories else BookSampler(s.name, stream))

    def __call__(self, step: int, batch: int, length: int, alpha: float) -> np.ndarray:
        """[batch, length + 1] ids; a source is drawn with probability proportional to its tokens ** alpha."""
        rng = np.random.default_rng((self.seed, step))
        p = np.asarray(self.sizes, dtype=float) ** alpha
        picks = rng.choice(len(p), size=batch, p=p / p.sum())
        return np.stack([self.samplers[i].window(length + 1, rng) for i in picks])


def encode_cached(docs: list[str], tok: Tokenizer, path: Path) -> np.ndarray:
    """Token ids of the documents, each followed by END, as uint16; kept in `path`."""
    if path.exists():
        cached: np.ndarray = np.load(path)
        return cached
    parts = [
        np.asarray([*e.ids, tok.token_to_id(END)], dtype=np.uint16)
        for e in tok.encode_batch(docs, add_special_tokens=False)
    ]
    stream = np.concatenate(parts)
    tmp = path.with_name("writing-" + path.name)  # numpy would append .npy to any other ending
    np.save(tmp, stream)
    os.replace(tmp, path)
    return stream


def save_tokenizer(tok: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja as transformers reads them."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "bos_token": None,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_atomically(folder / "chat_template.jinja", CHAT_TEMPLATE)
    write_atomically(folder / "tokenizer.json", tok.to_str(pretty=True))


def parse_count(text: str) -> int:
    """'100M' -> 100_000_000. Raises ArgumentTypeError when it is not a positive number."""
    unit = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower())
    try:
        count = round(float(text[:-1]) * unit) if unit else int(text)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a count (give a number such as 4096, 500k or 12M)")
    return count
