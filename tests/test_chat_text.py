"""From messages to tokens: what was asked before changes nothing but the tokens inside of the model's own replies."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from chat_sessions import open_session, say
from made_tokenizers import llama_like

from mlx_moecache.console.chat_text import KnownTexts
from mlx_moecache.demo import demo_model
from mlx_moecache.loading import OpenedModel

GIRL = "Once upon a time, there was a little girl"
LIT = "Once upon a time, there was a lit"  # ends in the middle of a word


@pytest.fixture(scope="module")
def demo() -> Any:
    return OpenedModel(demo_model()).tokenizer()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model without its chat template."""
    folder = tmp_path_factory.mktemp("plain") / "plain"
    shutil.copytree(demo_model(), folder, ignore=shutil.ignore_patterns("chat_template*"))
    return folder


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("rest", ["tle girl", "", " fox", "\nuser: hi", " <|user|>"])
def test_text_that_may_go_on_is_cut_as_if_nothing_were_known(demo: Any, rest: str) -> None:
    known = KnownTexts()
    known.add(LIT, [7, 8])
    assert known.encode(LIT + rest, demo, add_special_tokens=False) == encode(demo, LIT + rest)


def test_a_reply_keeps_its_tokens_where_an_added_token_follows(demo: Any) -> None:
    known = KnownTexts()
    prompt, rest = "<|user|>Who?<|assistant|>", "<|endoftext|><|user|>And?<|assistant|>"
    reply = encode(demo, "A lit") + encode(demo, "tle girl")
    assert reply != encode(demo, "A little girl")
    first = known.encode(prompt, demo, add_special_tokens=False)
    known.add(prompt + "A little girl", first + reply)
    second = known.encode(prompt + "A little girl" + rest, demo, add_special_tokens=False)
    assert second == encode(demo, prompt) + reply + encode(demo, rest)
    known.add(prompt + "A little girl" + rest + "A", [*second, 7])
    assert known.encode(prompt + "A little girl" + rest + "A<|endoftext|>", demo, add_special_tokens=False) == [
        *second,
        7,
        0,
    ]
    # Another answer to the second question: the first one still has its own tokens.
    assert known.encode(prompt + "A little girl" + rest + "A fox", demo, add_special_tokens=False) == [
        *second,
        *encode(demo, "A fox"),
    ]
    known.add("<|user|>", [1])
    text = prompt + "A little girl" + rest
    assert known.encode(text, demo, add_special_tokens=False) == encode(demo, text), "of another past"


def test_a_tokenizer_that_puts_a_blank_before_everything_gets_the_whole_text() -> None:
    t = llama_like()
    prompt = list(t.encode("once upon"))
    for text in ("once upon a time", "once upon a\nuser: hi", "once upon a"):
        known = KnownTexts()
        known.add("once upon a", prompt + t.convert_tokens_to_ids(["▁", "a"]))
        assert known.encode(text, t, add_special_tokens=True) == list(t.encode(text))
    ended = known.encode("once upon a</s>user: hi", t, add_special_tokens=True)
    assert ended == [*prompt, *t.convert_tokens_to_ids(["▁", "a"]), *encode(t, "</s>user: hi")]


def test_without_a_template_no_earlier_message_changes_a_later_prompt(plain: Path) -> None:
    session = open_session(plain, slots=60, routing="original", max_tokens=12)
    assert not session.has_template
    fresh = say(session, GIRL)
    session.clear()
    say(session, LIT)
    session.clear()
    assert say(session, GIRL) == fresh
    say(session, "Then")
    session.messages.append({"role": "user", "content": "And then"})
    text = "\n".join(m["content"] for m in session.messages)
    assert session.prompt_tokens() == list(session.tokenizer.encode(text))
    session.model.expert_cache.close()


def test_a_long_conversation_with_a_template_computes_only_what_is_new() -> None:
    session = open_session(demo_model(), slots=60, routing="original", max_context=1200, max_tokens=40, temp=1.2)
    mx.random.seed(1)
    for n in range(8):
        held = list(session.conversation.tokens)
        say(session, f"Tell me about number {n}.")
        assert session.conversation.reused == len(held)
    whole = encode(session.tokenizer, session.tokenizer.decode(session.conversation.tokens))
    assert whole != session.conversation.tokens, "or the tokenizer alone would have done"
    session.model.expert_cache.close()
