"""GSM8K: what the model is asked, which number counts as its answer, and replies as units of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from tiny_models import EOS, Shelf

from mlx_moecache.errors import UsageError
from mlx_moecache.generation import Sampler
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.stats import CacheStats, PhaseStats
from mlx_moecache.study.question_scoring import Reply, answer_question, judged, reply
from mlx_moecache.study.tasks import ReplyDocument
from mlx_moecache.study.tasks_gsm8k import Gsm8k, extract_flexible, extract_strict, parse_number, read_problems

EXAMPLES = [
    (f"Tom has {i} nuts and finds {i + 1}. How many?", f"{i}+{i + 1}=<<x>>\n#### {2 * i + 1}") for i in range(9)
]
QUESTIONS = [
    ("Ann saves $1,000 twice.\nHow much?", "2*1000=2000\n#### 2,000"),
    ("What is 3 less 5?", "3-5=-2\n#### -2"),
]
TASK = Gsm8k()


def write(path: Path, problems: Sequence[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in problems), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", EXAMPLES)
    write(tmp_path / "test_part.jsonl", QUESTIONS)
    return tmp_path


# ---- what the model is asked ----


def test_a_prompt_is_worked_examples_and_then_the_question(folder: Path) -> None:
    documents = Gsm8k(shots=2).documents(folder, seed=3)
    *shots, question = documents[1].prompt.split("\n\n")
    assert question == "Question: What is 3 less 5?\nAnswer:"
    assert len(shots) == 2
    assert all(s in [f"Question: {q}\nAnswer: {a}" for q, a in EXAMPLES] for s in shots)
    assert documents[0].prompt.split("\n\n")[:2] == shots  # the same before every question
    assert [(d.id, Decimal(d.answer)) for d in documents] == [(0, 2000), (1, -2)]


def test_eight_examples_are_drawn_by_the_seed(folder: Path) -> None:
    prompts = [TASK.documents(folder, seed=s)[0].prompt for s in (0, 0, 1)]
    assert prompts[0] == prompts[1] != prompts[2]
    assert prompts[0].count("Answer: ") == 8


def test_without_examples_no_file_of_them_is_needed(tmp_path: Path) -> None:
    documents = Gsm8k(shots=0).documents(write(tmp_path / "q.jsonl", QUESTIONS), seed=0)
    assert documents[1].prompt == "Question: What is 3 less 5?\nAnswer:"


def test_examples_may_come_from_another_file(tmp_path: Path) -> None:
    task = Gsm8k(few_shot_data=write(tmp_path / "shots.jsonl", EXAMPLES), shots=9)
    assert "Tom has 8 nuts" in task.documents(write(tmp_path / "q.jsonl", QUESTIONS), seed=0)[0].prompt


def test_a_question_that_is_asked_never_serves_as_an_example(tmp_path: Path) -> None:
    questions = write(tmp_path / "q.jsonl", EXAMPLES[:5])
    task = Gsm8k(few_shot_data=write(tmp_path / "shots.jsonl", EXAMPLES), shots=4)
    for document in task.documents(questions, seed=0):
        assert document.prompt.count(document.prompt.rsplit("Question: ", 1)[1]) == 1
    with pytest.raises(UsageError, match=r"4 problems that are not asked themselves, too few for 5 examples"):
        Gsm8k(few_shot_data=tmp_path / "shots.jsonl", shots=5).documents(questions, seed=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", 'lacks "question" or "answer"'),
        ('{"question": "x?", "answer": 3}', 'lacks "question" or "answer"'),
        ('{"question": " ", "answer": "#### 3"}', 'lacks "question" or "answer"'),
        ('{"question": "x?", "answer": "The answer is 3"}', "has no '#### number'"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "q.jsonl", QUESTIONS[:1])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UsageError, match=r"q\.jsonl, line 2") as error:
        read_problems(path)
    assert message in str(error.value)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    def refused(task: Gsm8k, path: Path, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            task.documents(path, seed=0)

    refused(TASK, tmp_path / "nowhere", "does not exist")
    refused(TASK, tmp_path, r"one test\*\.jsonl \(found: none\)")
    questions = write(tmp_path / "test.jsonl", QUESTIONS)
    refused(TASK, tmp_path, r"cannot read .*train\.jsonl")
    refused(TASK, questions, "--shots-data")
    write(tmp_path / "train.jsonl", EXAMPLES[:3])
    refused(TASK, tmp_path, "3 problems that are not asked themselves, too few for 8")
    write(tmp_path / "test2.jsonl", QUESTIONS)
    refused(TASK, tmp_path, r"found: test\.jsonl, test2\.jsonl")
    refused(Gsm8k(shots=-1), questions, "at least 0")
    questions.write_text("\n")
    refused(Gsm8k(shots=0), questions, "has no problems")
    questions.write_bytes(b"\xff\xfe")
    refused(Gsm8k(shots=0), questions, "not UTF-8")


# ---- which number counts ----


@pytest.mark.parametrize(
    ("reply_text", "strict", "flexible"),
    [
        ("3+4=7\n#### 7", 7, 7),
        ("so #### $1,234.50.", "1234.5", "1234.5"),
        ("####7 and 9 more", 7, 9),
        ("The answer is 5.\n\nOr is it 6?", 5, 6),
        ("the final answer is: -$12.", -12, -12),
        ("The answer is 15 at first, #### 120", 120, 120),
        ("We get 10-2=8 apples.", None, 8),
        ("It cost (3)-5", None, 5),
        ("x = -5", None, -5),
        ("about .5 of it", None, "0.5"),
        ("1. Add 2.\n2. Take 3.", None, 3),
        ("no idea", None, None),
        ("#### seven", None, None),
        ("", None, None),
    ],
)
def test_strict_wants_a_marker_and_flexible_takes_the_last_number(
    reply_text: str, strict: str | int | None, flexible: str | int | None
) -> None:
    def number(x: str | int | None) -> Decimal | None:
        return None if x is None else Decimal(x)

    assert extract_strict(reply_text) == number(strict)
    assert extract_flexible(reply_text) == number(flexible)


@given(
    st.integers(-(10**12), 10**12), st.integers(0, 99), st.sampled_from(["", "$"]), st.sampled_from(["", ".", ".\n\n"])
)
def test_numbers_are_compared_as_numbers_however_they_are_written(
    whole: int, cents: int, currency: str, end: str
) -> None:
    sign = "-" if whole < 0 else ""
    written = f"{sign}{currency}{abs(whole):,}.{cents:02d}{end}"
    value = Decimal(f"{whole}.{cents:02d}") if whole else Decimal(f"{sign}0.{cents:02d}")
    assert parse_number(written) == value
    assert extract_strict(f"12 - 3 is 9\n#### {written}") == value
    assert extract_flexible(f"12 - 3 is 9, so {written}") == value
    document = ReplyDocument(0, "", str(value))
    assert TASK.judge(document, f"#### {written}") == {"strict": True, "flexible": True}
    assert TASK.judge(document, f"#### {value + 1}") == {"strict": False, "flexible": False}


def test_the_right_answer_of_every_problem_is_judged_right() -> None:
    for question, answer in [*EXAMPLES, *QUESTIONS]:
        document = ReplyDocument(0, question, answer.rsplit("#### ", 1)[1])
        assert TASK.judge(document, f" {answer}") == {"strict": True, "flexible": True}


@pytest.mark.parametrize("text", ["", "$", ".", "NaN", "Infinity", "1e", "--1"])
def test_what_is_no_number_is_none(text: str) -> None:
    assert parse_number(text) is None


# ---- replies ----


@pytest.fixture(scope="module")
def tokenizer(shelf: Shelf) -> TokenizerWrapper:
    return load_tokenizer(shelf.checkpoint("qwen2_moe"), eos_token_ids=[EOS])


@pytest.fixture(scope="module")
def model(shelf: Shelf) -> nn.Module:
    options = MemoryOptions(slots=5, max_context=512)
    return OpenedModel(shelf.checkpoint("qwen2_moe")).load(
        options, CacheOptions(routing="cache-prior:strength=0.5,j=1")
    )


@dataclass
class Writer:
    """Makes the model write a text whatever it thinks; its tokenizer has one token per byte."""

    model: nn.Module
    tokenizer: TokenizerWrapper

    def __call__(self, text: str, *, stops: Sequence[str] = (), max_tokens: int = 99, ends: bool = False) -> Reply:
        tokens = iter(self.tokenizer.encode(text) + [EOS] * ends)
        sampler: Sampler = lambda logprobs: mx.array([next(tokens)])  # noqa: E731
        return reply(self.model, self.tokenizer, "Q", stops=stops, max_tokens=max_tokens, sampler=sampler)


@pytest.fixture
def write_reply(model: nn.Module, tokenizer: TokenizerWrapper) -> Writer:
    return Writer(model, tokenizer)


def test_a_reply_ends_before_a_stop_and_nothing_is_generated_after_it(write_reply: Writer) -> None:
    text = "7.\n#### 7\n\nQuestion: And?</s>"
    written = write_reply(text, stops=TASK.stops)
    assert (written.text, written.is_cut) == ("7.\n#### 7\n\n", False)
    assert written.tokens == text.index(":") + 1


def test_the_earliest_stop_wins_not_the_one_listed_first(write_reply: Writer) -> None:
    assert write_reply("xxabc", stops=["b", "ab", "c"]).text == "xx"


def test_a_stop_is_not_missed_in_a_long_reply_or_at_its_first_token(write_reply: Writer) -> None:
    assert write_reply("ab" * 20 + "aab" + "ab", stops=["aab", "never written"]).text == "ab" * 20
    assert write_reply("abc", stops=["a"]).text == ""


def test_a_reply_ends_where_the_model_ends_it(write_reply: Writer) -> None:
    written = write_reply("4!", ends=True)
    assert (written.text, written.tokens, written.is_cut) == ("4!", 3, False)


def test_a_reply_that_reaches_the_limit_says_so(write_reply: Writer) -> None:
    written = write_reply("12345", stops=["x"], max_tokens=4)
    assert (written.text, written.tokens, written.is_cut) == ("1234", 4, True)
    at_the_limit = write_reply("12345", stops=["4"], max_tokens=4)
    assert (at_the_limit.text, at_the_limit.is_cut) == ("123", False)


def test_a_unit_holds_the_judgement_and_the_counters_of_decode() -> None:
    stats = CacheStats(
        prefill=PhaseStats(selections=99, misses=99, loads=99), decode=PhaseStats(40, 30, 10, 10, 5, 0.1, 7)
    )
    document = ReplyDocument(17, "", "7")
    unit = judged(TASK, document, Reply("It is 7", 11, False, stats), moe_layers=2)
    assert (unit.id, unit.correct, unit.scores) == (17, 0, {"strict": 0, "flexible": 1})
    assert (unit.tokens, unit.token_layers) == (11, 20)
    assert (unit.selections, unit.misses, unit.loads, unit.swapped) == (40, 10, 10, 7)


def test_a_unit_does_not_depend_on_the_questions_before_it(model: nn.Module, tokenizer: TokenizerWrapper) -> None:
    # Prompts so short that they leave most of an earlier question's experts where they are.
    questions = [ReplyDocument(i, text, "4") for i, text in enumerate("Qx")]
    first = answer_question(model, tokenizer, TASK, questions[0], 12)
    again = [answer_question(model, tokenizer, TASK, q, 12) for q in (questions[1], questions[0])]
    assert first == again[1]
    assert first != again[0]
    assert first.misses and first.swapped  # the bias acted, so order could have mattered
    assert first.selections == first.token_layers * model.expert_cache.layers[0].k
