r"""GSM8K: grade-school arithmetic, answered step by step after worked examples, and judged by the final number.

One line of its JSON Lines files:

    {"question": "Ann has 3 bags of 4 apples and eats 2. How many are left?",
     "answer": "She had 3*4=<<3*4=12>>12 apples.\n12-2=<<12-2=10>>10 are left.\n#### 10"}

Prompt and extraction are those of lm-evaluation-harness's `gsm8k` task, so that figures can be compared: examples keep
their annotations <<...>>, *strict* wants the marker that the examples taught, *flexible* takes the last number. Here
strict also accepts the other customary marker, "The answer is N". Numbers are compared as numbers: 1,000 is 1000.00.
A solution's own number is the one after its "####". Knows files and text only: no model, no tokens.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from ..errors import UsageError
from .tasks import ReplyDocument, Scope

# A hyphen after a letter, digit or bracket is no sign: 12-2, (3)-5.
_NUMBER = r"(?:(?<![\w).])-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_MARKED = re.compile(rf"####\s*({_NUMBER})")
_SAID = re.compile(rf"\b[Tt]he (?:final )?answer is:?\s*({_NUMBER})")
_ANY_NUMBER = re.compile(_NUMBER)


@dataclass(frozen=True)
class Problem:
    """One question and its worked solution, as in the file."""

    question: str
    answer: str

    @property
    def number(self) -> Decimal | None:
        """The number after "####"; `read_problems` makes sure that it is there."""
        return _first(_MARKED, self.answer)


@dataclass(frozen=True)
class Gsm8k:
    """The task. `seed` of `documents` draws the examples, which are the same before every question."""

    few_shot_data: Path | None = None  # file of the examples; None: train.jsonl beside the questions of a folder
    shots: int = 8
    max_tokens: int = 512  # solutions in the data have up to about 400
    stops: tuple[str, ...] = ("Question:", "</s>", "<|im_end|>")
    name: str = "gsm8k"
    default_scope: Scope = "decode"

    def documents(self, path: Path, *, seed: int) -> Sequence[ReplyDocument]:
        """All questions at `path`: a folder with train.jsonl and one test*.jsonl, or one file with `few_shot_data`.

        A question that is asked never serves as an example. Raises UsageError.
        """
        if self.shots < 0:
            raise UsageError(f"the number of examples must be at least 0, not {self.shots}")
        questions_file, examples_file = _find_files(path, self.few_shot_data, self.shots)
        problems = read_problems(questions_file)
        examples: list[Problem] = []
        if examples_file is not None:
            examples = _draw(read_problems(examples_file), problems, self.shots, seed, examples_file)
        return [ReplyDocument(i, few_shot_prompt(examples, p.question), str(p.number)) for i, p in enumerate(problems)]

    def judge(self, document: ReplyDocument, reply: str) -> Mapping[str, bool]:
        """{"strict": .., "flexible": ..}: is the number that this way finds the right one?"""
        answer = parse_number(document.answer)
        return {"strict": extract_strict(reply) == answer, "flexible": extract_flexible(reply) == answer}


def read_problems(path: Path) -> list[Problem]:
    """All problems of a JSON Lines file, in its order. Raises UsageError with the line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as e:
        raise UsageError(f"cannot read {path}: {e.strerror or e}; give a GSM8K file such as test.jsonl") from e
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text; give a GSM8K file such as test.jsonl") from None
    problems = [_problem(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not problems:
        raise UsageError(f"{path} has no problems; give a GSM8K file such as test.jsonl")
    return problems


def few_shot_prompt(examples: Sequence[Problem], question: str) -> str:
    """What the model reads: worked examples, then the question, up to "Answer:"."""
    shots = "".join(f"Question: {e.question}\nAnswer: {e.answer}\n\n" for e in examples)
    return f"{shots}Question: {question}\nAnswer:"


def extract_strict(reply: str) -> Decimal | None:
    """The number after the first "####", else after the first "The answer is"; None without such a marker."""
    marked = _first(_MARKED, reply)
    return _first(_SAID, reply) if marked is None else marked


def extract_flexible(reply: str) -> Decimal | None:
    """The last number of the reply; None if there is none."""
    found = _ANY_NUMBER.findall(reply)
    return parse_number(found[-1]) if found else None


def parse_number(text: str) -> Decimal | None:
    """A number without currency, thousands separators and full stop; None if it is not one."""
    try:
        number = Decimal(text.strip().replace("$", "").replace(",", "").rstrip("."))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _first(pattern: re.Pattern[str], text: str) -> Decimal | None:
    found = pattern.search(text)
    return parse_number(found[1]) if found else None


def _problem(line: str, where: str) -> Problem:
    try:
        record = json.loads(line)
    except ValueError as e:
        raise UsageError(f"{where} is not JSON ({e}); give a GSM8K file, one object a line") from None
    question, answer = (record.get("question"), record.get("answer")) if isinstance(record, dict) else (None, None)
    if not isinstance(question, str) or not isinstance(answer, str) or not question.strip():
        raise UsageError(f'{where} lacks "question" or "answer" as text; give GSM8K\'s own files')
    problem = Problem(question.strip(), answer.strip())
    if problem.number is None:
        raise UsageError(f"{where}: its answer has no '#### number' at the end; give GSM8K's own files")
    return problem


def _find_files(path: Path, few_shot_data: Path | None, shots: int) -> tuple[Path, Path | None]:
    """Files of questions and of examples, the latter None if none are wanted."""
    if not path.exists():
        raise UsageError(f"{path} does not exist; give the folder or file with GSM8K's questions")
    questions, examples = path, few_shot_data
    if path.is_dir():
        tests = sorted(path.glob("test*.jsonl"))
        if len(tests) != 1:
            found = ", ".join(t.name for t in tests) or "none"
            raise UsageError(f"{path} must have one test*.jsonl (found: {found}); give the file itself instead")
        questions = tests[0]
        if examples is None:
            examples = path / "train.jsonl"
    if shots == 0:
        return questions, None
    if examples is None:
        raise UsageError(f"{path} is a file of questions; add --shots-data train.jsonl for the {shots} examples")
    return questions, examples


def _draw(pool: Sequence[Problem], asked: Sequence[Problem], shots: int, seed: int, path: Path) -> list[Problem]:
    questions = {p.question for p in asked}
    pool = [p for p in pool if p.question not in questions]
    if len(pool) < shots:
        raise UsageError(
            f"{path} has {len(pool)} problems that are not asked themselves, too few for {shots} examples; "
            "give the training split"
        )
    return random.Random(seed).sample(pool, shots)
