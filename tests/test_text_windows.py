"""Text for perplexity: the WikiText protocol, how windows are cut, and data that cannot be used."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_moecache.demo import DEMO_MODEL
from mlx_moecache.errors import UsageError
from mlx_moecache.loading import OpenedModel
from mlx_moecache.study.text_windows import cut, join_wikitext, read_text, sha256_of

RAW = " \n = Robert Boulter = \n \n Robert Boulter is an English actor .\n \t\n"


def letters(text: str) -> list[int]:
    return [ord(c) for c in text]


def test_wikitext_rows_keep_their_line_break_and_blank_rows_are_empty() -> None:
    # What datasets gives for this file: ["", " = Robert Boulter = \n", "", " Robert Boulter is ... .\n", ""]
    expected = "\n\n".join(["", " = Robert Boulter = \n", "", " Robert Boulter is an English actor .\n", ""])
    assert join_wikitext(RAW) == expected


def test_a_last_row_without_line_break_is_a_row() -> None:
    assert join_wikitext("a\nb") == "a\n\n\nb"


@given(st.lists(st.integers(0, 9), min_size=2, max_size=200), st.integers(1, 20), st.integers(1, 25))
def test_windows_are_whole_in_order_and_predict_each_token_at_most_once_if_they_do_not_overlap(
    ids: list[int], window: int, stride: int
) -> None:
    if len(ids) <= window:
        with pytest.raises(UsageError, match=f"needs {window + 1:,}"):
            cut("text", lambda text: ids, window=window, stride=stride)
        return
    windows = cut("text", lambda text: ids, window=window, stride=stride)
    assert len(windows) == windows.available >= 1
    for i in range(len(windows)):
        assert windows[i] == ids[i * stride : i * stride + window + 1] and len(windows[i]) == window + 1
    assert len(windows) * stride + window + 1 > len(ids)  # no further one fits


def test_windows_that_do_not_overlap_predict_every_token_once() -> None:
    windows = cut("abcdefghij", letters, window=3)
    assert ["".join(map(chr, windows[i])) for i in range(len(windows))] == ["abcd", "defg", "ghij"]
    with pytest.raises(IndexError):
        windows[3]


def test_a_limit_takes_the_first_windows_and_says_how_many_there_were() -> None:
    windows = cut("abcdefghij", letters, window=3, limit=2)
    assert (len(windows), windows.available) == (2, 3)
    assert len(cut("abcdefghij", letters, window=3, limit=99)) == 3


@pytest.mark.parametrize("wrong", [{"window": 0}, {"window": 3, "stride": 0}, {"window": 3, "limit": 0}])
def test_numbers_below_one_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="must be at least 1, not 0"):
        cut("abcdef", letters, **wrong)


def test_a_window_longer_than_the_text_is_refused_with_the_longest_that_fits() -> None:
    with pytest.raises(UsageError, match=r"the text has 6 tokens, one window needs 7 .* at most 5"):
        cut("abcdef", letters, window=6)
    assert len(cut("abcdef", letters, window=5)) == 1


def test_unusable_files_are_refused_by_name(tmp_path: Path) -> None:
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text(" \n\n")
    latin.write_bytes(b"caf\xe9")
    for path, message in (
        (tmp_path / "missing.txt", "cannot read .*missing.txt: No such file"),
        (tmp_path, "is a folder"),
        (empty, "empty.txt holds no text"),
        (latin, "latin.txt is not UTF-8 text .byte 3"),
    ):
        with pytest.raises(UsageError, match=message):
            read_text(path)


def test_windows_line_ends_and_a_byte_order_mark_do_not_change_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\r\n".encode())
    assert read_text(tmp_path / "a.txt") == "one\ntwo\n"


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"one\r\n")
    b.write_bytes(b"two")
    assert sha256_of([a]) == hashlib.sha256(b"one\r\n").hexdigest()
    assert sha256_of([a, b]) == hashlib.sha256(b"one\r\ntwo").hexdigest()
    with pytest.raises(UsageError, match="cannot read"):
        sha256_of([tmp_path / "missing"])


def test_a_text_is_tokenised_as_a_whole_without_special_tokens() -> None:
    tokenizer = OpenedModel(DEMO_MODEL).tokenizer()
    text = "Once upon a time, there was a fox.\n\nThe end."
    windows = cut(text, lambda t: tokenizer.encode(t, add_special_tokens=False), window=4, stride=1)
    assert tokenizer.decode([*windows[0], *(windows[i][-1] for i in range(1, len(windows)))]) == text
