r"""MMLU: multiple-choice questions from many subjects, answered by the likeliest of " A", " B", " C", " D".

Data are the original CSV files without header, `dev/SUBJECT_dev.csv` for the examples and `test/SUBJECT_test.csv` for
the questions, with rows of question, four choices and the right letter. The prompt is the original one: a headline with
the subject, five worked examples of that subject, the question:

    The following are multiple choice questions (with answers) about high school physics.

    ... five examples, each like this with its letter after "Answer:" ...

    Which of these is a unit of force?
    A. joule
    B. newton
    C. watt
    D. pascal
    Answer:

Knows files and text only: no model, no tokens.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from ..errors import UsageError
from .tasks import ChoiceDocument, Scope

LETTERS = ("A", "B", "C", "D")
ENDINGS = tuple(f" {letter}" for letter in LETTERS)


@dataclass(frozen=True)
class Row:
    """One row of a file."""

    question: str
    choices: tuple[str, ...]  # four
    letter: str


@dataclass(frozen=True)
class MmluDocument(ChoiceDocument):
    subject: str  # as in the file names, for example high_school_physics


@dataclass(frozen=True)
class SubjectAccuracy:
    n: int
    accuracy: float
    stderr: float | None  # None for fewer than two questions


@dataclass(frozen=True)
class Mmlu:
    """The task. Nothing is drawn: each context has the first `shots` examples of its subject."""

    subjects: tuple[str, ...] = ()  # none: all that have test questions
    shots: int = 5  # as many as each subject's file has
    name: str = "mmlu"
    default_scope: Scope = "all"

    def documents(self, path: Path, *, seed: int = 0) -> Sequence[MmluDocument]:
        """All questions below `path`, the folder that holds dev/ and test/. Raises UsageError.

        The first question of every subject comes first, then the second ones, and so on, so that any limit takes
        about as many from each.
        """
        if self.shots < 0:
            raise UsageError(f"the number of examples must be at least 0, not {self.shots}")
        columns = [self._subject(path, s) for s in _choose(find_subjects(path), self.subjects)]
        in_turn = [q for together in zip_longest(*columns) for q in together if q is not None]
        return [
            MmluDocument(i, context, ENDINGS, answer, subject) for i, (subject, context, answer) in enumerate(in_turn)
        ]

    def _subject(self, path: Path, subject: str) -> list[tuple[str, str, int]]:
        """(subject, context, answer) of one subject's questions."""
        questions = read_rows(path / "test" / f"{subject}_test.csv")
        examples: list[Row] = []
        if self.shots:
            file = path / "dev" / f"{subject}_dev.csv"
            examples = read_rows(file)[: self.shots]
            if len(examples) < self.shots:
                raise UsageError(f"{file} has {len(examples)} examples, {self.shots} are wanted; ask for fewer")
        return [(subject, prompt(subject, examples, q), LETTERS.index(q.letter)) for q in questions]


def find_subjects(path: Path) -> list[str]:
    """Subjects that have test questions, in alphabetical order. Raises UsageError if there are none."""
    if not (path / "test").is_dir():
        raise UsageError(f"{path} has no folder test/; give the folder that holds MMLU's dev/ and test/")
    subjects = sorted(f.name.removesuffix("_test.csv") for f in (path / "test").glob("*_test.csv"))
    if not subjects:
        raise UsageError(f"{path / 'test'} has no *_test.csv; give the folder that holds MMLU's dev/ and test/")
    return subjects


def read_rows(path: Path) -> list[Row]:
    """All rows of one CSV file. Raises UsageError with the row that is wrong."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [_row(cells, f"{path}, row {n}") for n, cells in enumerate(csv.reader(file), start=1) if cells]
    except OSError as e:
        raise UsageError(f"cannot read {path}: {e.strerror or e}; give MMLU's own folders dev/ and test/") from e
    except (UnicodeDecodeError, csv.Error) as e:
        raise UsageError(f"{path} is not CSV text in UTF-8 ({e}); give MMLU's own folders dev/ and test/") from None
    if not rows:
        raise UsageError(f"{path} is empty; give MMLU's own folders dev/ and test/")
    return rows


def prompt(subject: str, examples: Sequence[Row], question: Row) -> str:
    """What the model reads, up to "Answer:"."""
    about = " ".join(subject.split("_"))
    headline = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    shots = "".join(f"{_ask(e)} {e.letter}\n\n" for e in examples)
    return f"{headline}{shots}{_ask(question)}"


def by_subject(documents: Sequence[MmluDocument], correct: Mapping[int, int]) -> dict[str, SubjectAccuracy]:
    """Accuracy per subject from `correct` (document id -> 1 or 0), for the documents that it has.

    stderr = sqrt(a (1 - a) / (n - 1)), the standard error of a mean of zeros and ones.
    """
    judged: dict[str, list[int]] = {}
    for d in documents:
        if d.id in correct:
            judged.setdefault(d.subject, []).append(correct[d.id])
    result = {}
    for subject in sorted(judged):
        n, a = len(judged[subject]), sum(judged[subject]) / len(judged[subject])
        result[subject] = SubjectAccuracy(n, a, math.sqrt(a * (1 - a) / (n - 1)) if n > 1 else None)
    return result


def _choose(found: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Subjects to ask, in alphabetical order."""
    unknown = [s for s in wanted if s not in found]
    if unknown:
        raise UsageError(f"no test file for subject {', '.join(unknown)}; there is {', '.join(found)}")
    return sorted(set(wanted)) or list(found)


def _row(cells: Sequence[str], where: str) -> Row:
    if len(cells) != 6:
        raise UsageError(f"{where} has {len(cells)} columns, not 6 (question, four choices, letter); is this MMLU?")
    question, *choices, letter = (c.strip() for c in cells)
    if letter not in LETTERS:
        raise UsageError(
            f"{where} ends with {letter[:20]!r}, not with A, B, C or D; give MMLU's files without a header"
        )
    return Row(question, tuple(choices), letter)


def _ask(row: Row) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row.choices, strict=True))
    return f"{row.question}{choices}\nAnswer:"
