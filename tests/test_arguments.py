"""Flags: the same names and defaults as mlx_lm.generate, checked values, one line for every mistake."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import mlx_lm.generate  # noqa: F401  # the module; the package binds the name to a function
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_moecache.console import arguments
from mlx_moecache.errors import UsageError
from mlx_moecache.generate import setup_arg_parser

OUR_OWN_DEFAULTS = {
    "model",  # the bundled demo model
    "prefill_step_size",  # the memory plan chooses
}


def upstream_actions() -> list[argparse.Action]:
    parser: argparse.ArgumentParser = sys.modules["mlx_lm.generate"].setup_arg_parser()
    return [a for a in parser._actions if a.dest != "help"]


def parse(*argv: str) -> argparse.Namespace:
    args = setup_arg_parser().parse_args(list(argv))
    arguments.check_contradictions(args)
    return args


def refusal(*argv: str) -> str:
    with pytest.raises(UsageError) as error:
        parse(*argv)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("action", upstream_actions(), ids=lambda a: a.dest)
def test_every_flag_of_mlx_lm_is_supported_or_refused_by_name(action: argparse.Action) -> None:
    ours = setup_arg_parser()._option_string_actions
    for flag in action.option_strings:
        assert flag in ours, f"mlx-lm has {flag}: support it, or refuse it in arguments.REFUSED"
        if isinstance(ours[flag], arguments.Refuse):
            continue
        assert ours[flag].dest == action.dest
        assert (ours[flag].nargs, type(ours[flag])) == (action.nargs, type(action))
        if action.dest not in OUR_OWN_DEFAULTS:
            assert ours[flag].default == action.default


@pytest.mark.parametrize("text", ["true", "True", "T", "false", "False", "f", "F", "0", "no"])
def test_verbose_is_read_as_mlx_lm_reads_it(text: str) -> None:
    assert parse("--verbose", text).verbose == sys.modules["mlx_lm.generate"].str2bool(text)


@pytest.mark.parametrize("flag", [flag for flags in arguments.REFUSED for flag in flags])
@pytest.mark.parametrize("values", [[], ["a"], ["a", "b"]])
def test_refused_flags_name_themselves_and_the_way_out(flag: str, values: list[str]) -> None:
    message = refusal(flag, *values, "--prompt", "x")
    assert message.startswith(f"{flag}: ")
    assert "; " in message


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--max-tokens", "0"], "--max-tokens/-m: must be at least 1 (or -1), not 0"),
        (["-m", "-2"], "not -2"),
        (["-m", "many"], "needs a whole number, not 'many'"),
        (["--temp", "-0.1"], "--temp: must be at least 0, not -0.1"),
        (["--temp", "nan"], "not nan"),
        (["--temp", "inf"], "not inf"),
        (["--temp", "warm"], "needs a number, not 'warm'"),
        (["--top-p", "1.5"], "--top-p: must be between 0 and 1, not 1.5"),
        (["--min-p", "-1"], "between 0 and 1"),
        (["--top-k", "-1"], "at least 0"),
        (["--xtc-threshold", "0.6"], "between 0 and 0.5"),
        (["--seed", "-1"], "between 0 and"),
        (["--slots", "0"], "--slots: must be at least 1"),
        (["--slots", "2.5"], "whole number"),
        (["--strength", "-1"], "--strength: must be at least 0"),
        (["--kv-bits", "7"], "--kv-bits: unknown value '7' (choose 2, 3, 4, 5, 6, 8)"),
        (["--kv-group-size", "16"], "choose 32, 64, 128"),
        (["--eviction", "lruu"], "unknown eviction policy 'lruu' (choose lru, lfu, decay, lfru)"),
        (["--prefill-step-size", "0"], "at least 1"),
        (["--max-tokens"], "--max-tokens/-m: expected one argument"),
        (["--top"], "ambiguous option: --top"),
        (["--memroy", "4GB"], "unknown flag --memroy, did you mean --memory?"),
        (["--qqq=1"], "unknown flag --qqq (-h lists all)"),
        (["Tell me a story"], "the text to answer goes after --prompt"),
        (["--memory", "4GB", "--slots", "3"], "give one of them"),
        (["--slots", "3,0,4"], "--slots: must be at least 1"),
        (["--slots", "3,,4"], "whole number"),
        (["--slots", "3", "--elastic"], "need a budget to stay within"),
        (["--exact", "--routing", "cache-prior"], "leave one of them out"),
        (["--exact", "--strength", "0.1"], "--strength has no use"),
        (["--exact", "--top-j", "1"], "--top-j has no use"),
        (["--kv-bits", "4", "--max-kv-size", "64"], "give one"),
    ],
)
def test_mistakes_get_one_line_that_says_what_is_allowed(argv: list[str], part: str) -> None:
    assert part in refusal(*argv)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--exact", "--routing", "original"], "exact", True),
        (["--exact", "--strength", "0"], "strength", 0.0),
        (["-m", "-1"], "max_tokens", -1),
        (["--top-p", "0"], "top_p", 0.0),
        (["--kv-bits", "8"], "kv_bits", 8),
        (["--seed", str(2**64 - 1)], "seed", 2**64 - 1),
        (["-p", "-"], "prompt", "-"),
        (["-p", "- a list"], "prompt", "- a list"),
    ],
)
def test_values_at_the_edge_are_accepted(argv: list[str], name: str, value: Any) -> None:
    assert getattr(parse(*argv), name) == value


@given(low=st.integers(-5, 5), width=st.integers(0, 10), value=st.integers(-30, 30))
def test_whole_numbers_are_accepted_exactly_within_their_limits(low: int, width: int, value: int) -> None:
    convert = arguments.whole(low, most=low + width)
    if low <= value <= low + width:
        assert convert(str(value)) == value
    else:
        with pytest.raises(argparse.ArgumentTypeError):
            convert(str(value))


def test_help_names_every_group_gives_defaults_and_three_examples() -> None:
    text = setup_arg_parser().format_help()
    for group in ("model:", "prompt:", "memory and cache:", "routing:", "sampling:", "output:", "examples:"):
        assert f"\n{group}\n" in text
    assert text.count("mlx_moecache generate --") >= 3
    flags = [a for a in setup_arg_parser()._actions if a.help not in (None, argparse.SUPPRESS) and a.dest != "help"]
    without = [a.dest for a in flags if "default" not in str(a.help) and a.dest != "exact"]
    assert not without
    assert all(flag in text for flags in arguments.REFUSED for flag in flags)
