"""lm-evaluation-harness on a model of ours: its tasks in, its figures out, and what went through the cache.

Task definitions and data are made here; nothing is fetched. Skipped where the harness is not installed, but for the
first test.
"""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_moecache import load
from mlx_moecache.demo import demo_model
from mlx_moecache.errors import UsageError

if TYPE_CHECKING:
    from mlx_moecache.study.harness import MoeCacheLM
    from mlx_moecache.study.harness_tasks import HarnessTask
    from mlx_moecache.study.recurrence import Counts

SLOTS = 12
LIKELY = [  # after a story's beginning, words that the demo model has seen there, and others
    ("Once upon a", [" brick", " time"], 1),
    ("there was a little girl named", [" Lily", " because", " under it"], 0),
    ("She was very happy and", [" the of", " said"], 1),
]


def test_without_the_harness_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from mlx_moecache.errors import UsageError\n"
        "try: import mlx_moecache.study.harness_tasks\n"
        "except UsageError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'mlx-moecache[harness]'" in done.stdout


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple[nn.Module, TokenizerWrapper]]:
    pytest.importorskip("lm_eval")
    model, tokenizer = load(str(demo_model()), slots=SLOTS, routing="cache-prior:strength=0.3,j=1")
    yield model, tokenizer
    model.expert_cache.close()


@pytest.fixture
def lm(loaded: tuple[nn.Module, TokenizerWrapper]) -> MoeCacheLM:
    from mlx_moecache.study.harness import MoeCacheLM

    return MoeCacheLM(*loaded)


def exact_logits(model: nn.Module, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
    """[L, V], as the model itself has them: a prompt is not biased."""
    with model.expert_cache.phase("prefill"):
        return np.array(model(mx.array([list(tokens)]))[0].astype(mx.float32), dtype=np.float64)


def log_likelihood(lm: MoeCacheLM, context: Sequence[int], continuation: Sequence[int]) -> float:
    rows = exact_logits(lm.model, [*context, *continuation])[len(context) - 1 : -1]
    logprobs = (
        rows - np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1, keepdims=True)) - rows.max(-1, keepdims=True)
    )
    return float(sum(logprobs[i, t] for i, t in enumerate(continuation)))


class ExactScorer:
    """Original routing, and no cache."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.read: list[tuple[list[int], int]] = []

    def forward(self, tokens: Sequence[int], *, biased_from: int = 0) -> mx.array:
        self.read.append((list(tokens), biased_from))
        return mx.array(exact_logits(self.model, tokens).astype(np.float32))

    def take_counts(self) -> Counts:
        from mlx_moecache.study.recurrence import Counts

        return Counts()


@pytest.fixture
def exact(loaded: tuple[nn.Module, TokenizerWrapper]) -> MoeCacheLM:
    """With original routing, so that figures can be checked against the model's own logits."""
    from mlx_moecache.study.harness import MoeCacheLM

    return MoeCacheLM(*loaded, scorer=ExactScorer(loaded[0]))


# ---- local tasks ----


class Tasks:
    """Definitions and data in one folder, loaded as the harness does it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, documents: Sequence[Mapping[str, Any]], **settings: Any) -> str:
        data = self.folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(d) + "\n" for d in documents))
        definition = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(self.folder / "cache")},
            "test_split": "test",
            "doc_to_text": "{{question}}",
            **settings,
        }
        (self.folder / f"{name}.yaml").write_text(json.dumps(definition))  # JSON is YAML
        return name

    def choices(self) -> str:
        return self.write(
            "local_choices",
            [{"question": q, "choices": [c.strip() for c in choices], "gold": gold} for q, choices, gold in LIKELY],
            output_type="multiple_choice",
            doc_to_choice="{{choices}}",
            doc_to_target="{{gold}}",
            metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
        )

    def replies(self, **settings: Any) -> str:
        return self.write(
            "local_replies",
            [{"question": "Once upon a", "gold": "time"}, {"question": "Lily and her", "gold": "brick"}],
            **{
                "output_type": "generate_until",
                "doc_to_target": "{{gold}}",
                "generation_kwargs": {"until": [",", " was"], "max_gen_toks": 8, "do_sample": False},
                "metric_list": [{"metric": "exact_match"}],
                "filter_list": [
                    {"name": n, "filter": [{"function": "regex", "regex_pattern": p}, {"function": "take_first"}]}
                    for n, p in (("loose", r"(\w+)"), ("never", r"(\d+)"))
                ],
                **settings,
            },
        )

    def texts(self) -> str:
        return self.write(
            "local_texts",
            [{"page": "Once upon a time, there was a dog."}, {"page": "Lily played in the garden all day."}],
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{page}}",
            metric_list=[{"metric": "word_perplexity"}],
        )

    def task(self, name: str, **options: Any) -> HarnessTask:
        from mlx_moecache.study.harness_tasks import HarnessTask

        return HarnessTask(name, folder=self.folder, **options)

    def harness_itself(self, lm: MoeCacheLM, name: str, **options: Any) -> dict[str, Any]:
        import lm_eval
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(self.folder), include_defaults=False)
        result: dict[str, Any] = lm_eval.simple_evaluate(model=lm, tasks=[name], task_manager=manager, **options)
        return result


@pytest.fixture
def tasks(tmp_path: Path) -> Tasks:
    return Tasks(tmp_path)


# ---- log-likelihoods ----


def test_choices_are_judged_as_by_the_harness_itself(exact: MoeCacheLM, tasks: Tasks) -> None:
    name = tasks.choices()
    found = tasks.harness_itself(exact, name)
    units = list(tasks.task(name).units(exact))
    assert [u.correct for u in units] == [1, 1, 1]
    assert found["results"][name]["acc,none"] == 1.0
    assert found["results"][name]["acc_norm,none"] == np.mean([u.scores["acc_norm"] for u in units if u.scores])
    encode = exact.tokenizer.encode
    for sample, (question, choices, _) in zip(found["samples"][name], LIKELY, strict=True):
        for ((logprob, _),), choice in zip(sample["resps"], choices, strict=True):
            assert logprob == pytest.approx(log_likelihood(exact, encode(question), encode(choice)), abs=1e-4)


def test_the_bias_reaches_log_likelihoods_and_is_counted(lm: MoeCacheLM, tasks: Tasks) -> None:
    units = list(tasks.task(tasks.choices()).units(lm))
    for unit, (question, choices, _) in zip(units, LIKELY, strict=True):
        assert unit.selections and unit.swapped and unit.misses and unit.token_layers
        assert 0 < unit.swapped + unit.misses <= 2 * unit.selections
        continuations = [lm.tokenizer.encode(c) for c in choices]
        assert unit.tokens == sum(map(len, continuations))
        read = {tuple(c[:-1]) for c in continuations}
        layers = len(lm.model.expert_cache.layers)
        assert unit.token_layers == layers * sum(len(lm.tokenizer.encode(question)) + len(c) for c in read)
    assert lm.counted.selections == sum(u.selections or 0 for u in units)
    assert lm.counted.miss_rate == lm.counted.misses / lm.counted.selections


def test_under_decode_scope_only_continuations_are_biased(exact: MoeCacheLM, tasks: Tasks) -> None:
    exact.scope = "decode"
    list(tasks.task(tasks.choices()).units(exact))
    contexts = [len(exact.tokenizer.encode(q)) for q, _, _ in LIKELY]
    assert isinstance(exact.scorer, ExactScorer)
    assert {biased_from for _, biased_from in exact.scorer.read} == set(contexts)


def test_an_empty_context_is_the_beginning_of_a_text(exact: MoeCacheLM) -> None:
    ((logprob, is_greedy),) = exact.loglikelihood([request("loglikelihood", "", "Once upon")])
    tokens = exact.tokenizer.encode("Once upon")
    assert logprob == pytest.approx(log_likelihood(exact, [exact.tokenizer.eos_token_id], tokens), abs=1e-4)
    assert isinstance(is_greedy, bool)


def test_greedy_is_said_of_what_the_model_would_write(exact: MoeCacheLM) -> None:
    likeliest = exact.tokenizer.decode(
        [int(exact_logits(exact.model, exact.tokenizer.encode("Once upon a"))[-1].argmax())]
    )
    asked = [request("loglikelihood", "Once upon a", x) for x in (likeliest, " brick")]
    assert [greedy for _, greedy in exact.loglikelihood(asked)] == [True, False]


def test_a_context_that_is_too_long_loses_its_beginning_and_says_so(
    exact: MoeCacheLM, caplog: pytest.LogCaptureFixture
) -> None:
    exact.max_length = 9
    with caplog.at_level(logging.WARNING):
        exact.loglikelihood([request("loglikelihood", "One day she went to the park and found a big", " box")])
    assert isinstance(exact.scorer, ExactScorer)
    ((tokens, _),) = exact.scorer.read
    assert len(tokens) == 9
    assert exact.tokenizer.decode(tokens).endswith("found a big")
    assert "raise max_length" in caplog.text
    with pytest.raises(UsageError, match="above the max length 9"):
        exact.loglikelihood([request("loglikelihood", "One", " day she went to the park and found a big box there")])


def test_whole_texts_are_scored_once_per_token(exact: MoeCacheLM, tasks: Tasks) -> None:
    name = tasks.texts()
    found = tasks.harness_itself(exact, name)
    units = list(tasks.task(name).units(exact))
    for unit, text in zip(
        units, ("Once upon a time, there was a dog.", "Lily played in the garden all day."), strict=True
    ):
        tokens = exact.tokenizer.encode(text)
        assert unit.tokens == len(tokens)
        assert unit.nll == pytest.approx(-log_likelihood(exact, [exact.tokenizer.eos_token_id], tokens), abs=1e-3)
        assert unit.correct is None
    words = 8 + 7
    perplexity = math.exp(sum(u.nll or 0 for u in units) / words)
    assert found["results"][name]["word_perplexity,none"] == pytest.approx(perplexity)


@given(st.integers(2, 60), st.integers(2, 20))
def test_windows_predict_each_token_once_with_as_much_context_as_fits(length: int, max_length: int) -> None:
    pytest.importorskip("lm_eval")
    from mlx_moecache.study.harness import rolling_windows

    pairs = rolling_windows(range(length), max_length)
    assert [t for _, continuation in pairs for t in continuation] == list(range(1, length))
    for context, continuation in pairs:
        assert [*context, *continuation] == list(range(context[0], continuation[-1] + 1))
        read = len(context) + len(continuation) - 1
        assert read == min(max_length, continuation[-1])


# ---- replies ----


def test_replies_stop_where_the_task_says_and_are_judged_in_every_way(lm: MoeCacheLM, tasks: Tasks) -> None:
    name = tasks.replies()
    found = tasks.harness_itself(lm, name)
    replies = [s["resps"][0][0] for s in found["samples"][name] if s["filter"] == "loose"]
    assert replies[0] == "time"  # then a comma
    assert not any("," in r or " was" in r for r in replies)
    units = list(tasks.task(name).units(lm))
    assert [u.scores for u in units] == [{"exact_match_loose": g, "exact_match_never": 0} for g in (1, 0)]
    assert [u.correct for u in units] == [1, 0]
    assert found["results"][name]["exact_match,loose"] == 0.5
    layers = len(lm.model.expert_cache.layers)
    for unit in units:
        assert 1 <= unit.tokens <= 8
        assert unit.token_layers == (unit.tokens - 1) * layers
        assert unit.selections == unit.token_layers * lm.model.expert_cache.layers[0].k
    assert any(u.swapped for u in units)


def test_a_reply_longer_than_the_model_reads_is_refused(lm: MoeCacheLM) -> None:
    with pytest.raises(UsageError, match="generates 4096 tokens, above the max length 2048"):
        lm.generate_until([request("generate_until", "Once", {"until": [], "max_gen_toks": 4096})])


def test_sampling_follows_the_task(lm: MoeCacheLM) -> None:
    greedy = {"until": ".", "max_gen_toks": 12, "temperature": 0.0}
    hot = {"until": ["."], "max_tokens": 12, "temperature": 50.0, "do_sample": True}
    mx.random.seed(0)
    cold_a, cold_b, hot_a, hot_b = lm.generate_until(
        [request("generate_until", "One day", o) for o in (greedy, greedy, hot, hot)]
    )
    assert cold_a == cold_b
    assert len({cold_a, hot_a, hot_b}) == 3


# ---- a run ----


def test_an_interrupted_run_goes_on_where_it_was(exact: MoeCacheLM, tasks: Tasks) -> None:
    task = tasks.task(tasks.choices())
    whole = list(task.units(exact))
    assert [u.id for u in whole] == [0, 1, 2]
    first = next(task.units(exact))
    assert [first, *task.units(exact, skip={0})] == whole
    assert list(task.units(exact, limit=2)) == whole[:2]


def test_worked_examples_are_drawn_by_the_seed(exact: MoeCacheLM, tasks: Tasks) -> None:
    name = tasks.write(
        "local_shots",
        [{"question": f"{i} and {i}", "gold": i % 2} for i in range(20)],
        output_type="multiple_choice",
        doc_to_choice=["no", "yes"],
        doc_to_target="{{gold}}",
        fewshot_split="test",
        metric_list=[{"metric": "acc"}],
    )

    def contexts(**options: Any) -> list[str]:
        exact.scorer = ExactScorer(exact.model)
        list(tasks.task(name, **options).units(exact, limit=2))
        return [exact.tokenizer.decode(tokens) for tokens, _ in exact.scorer.read]

    assert contexts(shots=2) == contexts(shots=2) != contexts(shots=2, seed=1)
    assert contexts()[0].count(" and ") == 1
    assert contexts(shots=3)[0].count(" and ") == 4
    assert tasks.task(name, shots=3).shots == 3


def test_the_hash_is_of_data_and_definition(tasks: Tasks, loaded: object) -> None:
    before = tasks.task(tasks.replies())
    assert before.documents == 2
    assert before.sha256 == tasks.task("local_replies").sha256
    assert before.sha256 != tasks.task(tasks.replies(doc_to_text="{{question}}!")).sha256


def test_results_say_what_was_run(exact: MoeCacheLM, tasks: Tasks) -> None:
    config = tasks.harness_itself(exact, tasks.choices())["config"]
    assert config["routing"] == "cache-prior:strength=0.3,j=1"
    assert set(config["slots_per_layer"]) == {SLOTS}
    assert config["bias_scope"] == "all"


def test_a_chat_template_is_applied_where_the_harness_asks_for_it(exact: MoeCacheLM, tasks: Tasks) -> None:
    tasks.harness_itself(exact, tasks.choices(), apply_chat_template=True)
    assert isinstance(exact.scorer, ExactScorer)
    expected = exact.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Once upon a"}], tokenize=False, add_generation_prompt=True
    )
    tokens = exact.tokenizer.encode(expected)
    assert exact.scorer.read[0][0][: len(tokens)] == tokens
    assert exact.chat_template(True) == exact.tokenizer.chat_template
    assert exact.chat_template(False) is None
    assert "/" not in exact.tokenizer_name


def test_what_cannot_be_run_is_refused(tasks: Tasks, loaded: object, exact: MoeCacheLM) -> None:
    def refused(message: str, attempt: Callable[[], object]) -> None:
        with pytest.raises(UsageError, match=message):
            attempt()

    refused("has no task 'no_such_task'", lambda: tasks.task("no_such_task"))
    name = tasks.choices()
    (tasks.folder / f"{name}.jsonl").unlink()
    refused(f"cannot load the data of {name}", lambda: tasks.task(name))
    (tasks.folder / "pair.yaml").write_text(json.dumps({"group": "pair", "task": [tasks.replies(), tasks.texts()]}))
    refused("pair is a group of 2 tasks", lambda: tasks.task("pair"))
    unjudged = tasks.replies(metric_list=[{"metric": "bleu"}], filter_list=[])
    refused("judged neither by acc", lambda: list(tasks.task(unjudged).units(exact)))
    refused("is not a folder", lambda: type(tasks)(tasks.folder / "nowhere").task(name))


def evaluate(tasks: Tasks, *flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlx_moecache.evaluate", "demo", "--data", tasks.folder, *flags]
    return subprocess.run([str(x) for x in command], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_evaluate_measures_a_task_of_the_harness_and_continues_a_file(tasks: Tasks, loaded: object) -> None:
    results = tasks.folder / "results.json"
    specs = "original,cache-prior:strength=0.3,j=1"
    flags = ("--task", f"harness:{tasks.choices()}", "--slots", 12, "--routing", specs)
    done = evaluate(tasks, *flags, "--output", results)
    assert done.returncode == 0, done.stderr
    assert "harness:local_choices" in done.stdout
    assert "split" not in done.stderr  # no bars in a pipe
    whole = json.loads(results.read_text())
    original, biased = whole["runs"]
    assert [u["correct"] for u in original["units"]] == [1, 1, 1]
    assert original["metrics"]["swapped_share"] == 0 < biased["metrics"]["swapped_share"]
    assert biased["metrics"]["miss_rate"] < original["metrics"]["miss_rate"]
    partial = json.loads(json.dumps(whole))
    del partial["runs"][1]["units"][1:]
    partial["runs"][1]["ranges"] = None
    results.write_text(json.dumps(partial))
    assert evaluate(tasks, *flags, "--output", results).returncode == 0
    again = json.loads(results.read_text())["runs"]
    assert [u["id"] for u in again[1]["units"]] == [0, 1, 2]
    assert again[0] == original


def test_lengths_that_cannot_work_are_refused(loaded: tuple[nn.Module, TokenizerWrapper]) -> None:
    from mlx_moecache.study.harness import MoeCacheLM

    for lengths in ({"max_length": 1}, {"max_length": 64, "max_gen_toks": 64}, {"max_gen_toks": 0}):
        with pytest.raises(UsageError, match="max length"):
            MoeCacheLM(*loaded, **lengths)


def request(kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("x", 0, 1))  # type: ignore[arg-type]
