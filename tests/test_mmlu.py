"""MMLU: what the model is asked, and which of several continuations is the likeliest."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.utils import load_tokenizer

from mlx_moecache.demo import demo_model
from mlx_moecache.errors import UsageError
from mlx_moecache.study.question_scoring import Scored, encode_choices, score_continuations
from mlx_moecache.study.tasks import Scope
from mlx_moecache.study.tasks_mmlu import Mmlu, by_subject, find_subjects, read_rows

Rows = Sequence[Sequence[str]]
TASK = Mmlu()
LETTERS = (" A", " B", " C", " D")


def write(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def rows_of(what: str, n: int, letters: str = "ABCD") -> list[list[str]]:
    return [[f"{what} {i}?", "one", "two, or so", 'a "third"', "four", letters[i % len(letters)]] for i in range(n)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for subject, questions in (("high_school_art", 3), ("zoology", 1)):
        write(tmp_path / "dev" / f"{subject}_dev.csv", rows_of(f"{subject} example", 5, "DC"))
        write(tmp_path / "test" / f"{subject}_test.csv", rows_of(f"{subject} question", questions, "BD"))
    return tmp_path


# ---- what the model is asked ----


def test_the_prompt_is_the_original_one(folder: Path) -> None:
    document = Mmlu(shots=1).documents(folder)[0]
    choices = 'A. one\nB. two, or so\nC. a "third"\nD. four\nAnswer:'
    assert document.context == (
        "The following are multiple choice questions (with answers) about high school art.\n\n"
        f"high_school_art example 0?\n{choices} D\n\n"
        f"high_school_art question 0?\n{choices}"
    )
    assert document.choices == LETTERS
    assert (document.answer, document.subject) == (1, "high_school_art")


def test_each_context_has_five_examples_of_its_own_subject(folder: Path) -> None:
    for document in TASK.documents(folder):
        assert [f"{document.subject} example {i}?" in document.context for i in range(6)] == [True] * 5 + [False]
        assert document.context.count(" example ") == 5


def test_the_first_questions_are_a_fair_sample_of_subjects(folder: Path) -> None:
    documents = TASK.documents(folder)
    assert [d.id for d in documents] == [0, 1, 2, 3]
    assert [d.subject for d in documents] == ["high_school_art", "zoology", "high_school_art", "high_school_art"]
    assert [d.answer for d in documents] == [1, 1, 3, 1]


def test_subjects_may_be_chosen(folder: Path) -> None:
    assert find_subjects(folder) == ["high_school_art", "zoology"]
    assert {d.subject for d in Mmlu(subjects=("zoology", "zoology")).documents(folder)} == {"zoology"}
    with pytest.raises(UsageError, match="no test file for subject botany; there is high_school_art, zoology"):
        Mmlu(subjects=("botany", "zoology")).documents(folder)


def test_without_examples_their_folder_is_not_needed(folder: Path) -> None:
    for file in (folder / "dev").iterdir():
        file.unlink()
    assert "example" not in Mmlu(shots=0).documents(folder)[0].context


def test_what_is_missing_is_said(folder: Path) -> None:
    def refused(task: Mmlu, path: Path, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            task.documents(path)

    refused(TASK, folder / "nowhere", "has no folder test/")
    refused(TASK, folder / "test", "has no folder test/")
    refused(Mmlu(shots=6), folder, "has 5 examples, 6 are wanted")
    refused(Mmlu(shots=-1), folder, "at least 0")
    (folder / "dev" / "zoology_dev.csv").unlink()
    refused(TASK, folder, r"cannot read .*zoology_dev\.csv")
    for file in (folder / "test").iterdir():
        file.unlink()
    refused(TASK, folder, r"has no \*_test\.csv")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["q", "1", "2", "3", "A"], "row 2 has 5 columns, not 6"),
        (["question", "A", "B", "C", "D", "answer"], "row 2 ends with 'answer'"),
        (["q", "1", "2", "3", "4", ""], "row 2 ends with ''"),
        (["q", "1", "2", "3", "4", "AB"], "row 2 ends with 'AB'"),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, row: list[str], message: str) -> None:
    path = tmp_path / "x_test.csv"
    write(path, [*rows_of("x", 1), row])
    with pytest.raises(UsageError, match=message):
        read_rows(path)


def test_files_that_are_no_csv_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x_test.csv"
    for content, message in ((b"", "is empty"), (b"\xff\xfe,\n", "is not CSV text"), (b"a" * 200_000, "is not CSV")):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=message):
            read_rows(path)


def test_accuracy_per_subject_has_a_standard_error(folder: Path) -> None:
    documents = TASK.documents(folder)
    result = by_subject(documents, {0: 1, 1: 1, 2: 0, 3: 1})
    art = np.array([1, 0, 1])
    assert (result["high_school_art"].n, result["high_school_art"].accuracy) == (3, pytest.approx(2 / 3))
    assert result["high_school_art"].stderr == pytest.approx(art.std(ddof=1) / math.sqrt(3))
    assert (result["zoology"].n, result["zoology"].accuracy, result["zoology"].stderr) == (1, 1.0, None)
    assert list(by_subject(documents, {1: 0})) == ["zoology"]


# ---- context and choices as tokens ----


class Merging:
    """A tokenizer of letters, in which "ab" is one token."""

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for letter in text:
            if letter == "b" and ids and ids[-1] == ord("a"):
                ids[-1] = 1000
            else:
                ids.append(ord(letter))
        return ids


def test_letters_are_one_token_each_after_the_whole_context() -> None:
    tokenizer = load_tokenizer(demo_model())
    context = "Is it so?\nA. yes\nAnswer:"
    for choice, (before, after) in zip(LETTERS, encode_choices(tokenizer, context, LETTERS), strict=True):
        assert before == tokenizer.encode(context)
        assert tokenizer.decode(after) == choice
        assert len(after) == 1


def test_blanks_at_the_end_of_the_context_belong_to_the_choice() -> None:
    tokenizer = load_tokenizer(demo_model())
    assert encode_choices(tokenizer, "Answer: ", ("A", "B")) == encode_choices(tokenizer, "Answer:", (" A", " B"))


def test_a_token_that_one_choice_changes_is_scored_with_every_choice() -> None:
    pairs = encode_choices(Merging(), "xa", ("b", "c"))  # type: ignore[arg-type]
    assert pairs == [([ord("x")], [1000]), ([ord("x")], [ord("a"), ord("c")])]


@pytest.mark.parametrize(("context", "choices"), [("x", ("", "b")), ("", ("b", "c")), ("a", ("b", "c"))])
def test_what_leaves_no_token_cannot_be_scored(context: str, choices: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="cannot score"):
        encode_choices(Merging(), context, choices)  # type: ignore[arg-type]


# ---- log-likelihoods ----

VOCABULARY = 7


class TableScorer:
    """Logits that depend on all tokens before them; remembers what was read."""

    def __init__(self) -> None:
        self.read: list[tuple[tuple[int, ...], int]] = []

    def forward(self, tokens: Sequence[int], *, biased_from: int = 0) -> mx.array:
        self.read.append((tuple(tokens), biased_from))
        return mx.array(np.stack([self.row(tokens[: i + 1]) for i in range(len(tokens))]))

    @staticmethod
    def row(tokens: Sequence[int]) -> np.ndarray[Any, Any]:
        return np.random.default_rng(list(tokens)).normal(size=VOCABULARY).astype(np.float32) * 5

    def take_counts(self) -> Any:
        raise NotImplementedError


def naive(context: Sequence[int], continuation: Sequence[int]) -> Scored:
    total, is_greedy, tokens = 0.0, True, list(context)
    for t in continuation:
        row = TableScorer.row(tokens).astype(np.float64)
        total += float(row[t] - np.log(np.exp(row).sum()))
        is_greedy &= t == int(row.argmax())
        tokens.append(t)
    return Scored(total, is_greedy)


token_lists = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4)


@given(st.lists(st.tuples(token_lists, token_lists), min_size=1, max_size=6), st.sampled_from(["all", "decode"]))
def test_a_continuation_is_scored_token_by_token_after_its_context(
    pairs: list[tuple[list[int], list[int]]], scope: Scope
) -> None:
    scorer = TableScorer()
    for scored, (context, continuation) in zip(score_continuations(scorer, pairs, scope), pairs, strict=True):
        expected = naive(context, continuation)
        assert scored.logprob == pytest.approx(expected.logprob, abs=1e-6)
        assert scored.is_greedy == expected.is_greedy
    assert len(scorer.read) <= len(pairs)
    assert all(at == 0 if scope == "all" else at > 0 for _, at in scorer.read)


def test_the_likeliest_token_is_greedy() -> None:
    best = int(TableScorer.row([3]).argmax())
    (scored, other) = score_continuations(TableScorer(), [([3], [best]), ([3], [(best + 1) % VOCABULARY])], "all")
    assert scored.is_greedy and not other.is_greedy
    assert other.logprob < scored.logprob < 0


def test_one_token_choices_share_one_pass_and_longer_ones_do_not() -> None:
    scorer = TableScorer()
    score_continuations(scorer, [([1, 2], [t]) for t in range(4)], "all")
    assert scorer.read == [((1, 2), 0)]
    scorer = TableScorer()
    score_continuations(scorer, [([1, 2], [3, t]) for t in range(4)] + [([1, 2], [4, 0])], "decode")
    assert scorer.read == [((1, 2, 3), 2), ((1, 2, 4), 2)]


def test_the_same_tokens_are_read_again_where_biasing_begins_elsewhere() -> None:
    scorer = TableScorer()
    score_continuations(scorer, [([1, 2], [3]), ([1], [2, 3])], "decode")
    assert scorer.read == [((1, 2), 2), ((1, 2), 1)]


def test_nothing_has_the_log_likelihood_of_certainty() -> None:
    scorer = TableScorer()
    assert score_continuations(scorer, [([1], [])], "all") == [Scored(0.0, True)]
    assert scorer.read == []
