"""The picture of /cache: bars, figures, and that it fits a narrow terminal whatever the numbers are."""

from __future__ import annotations

import pytest

from mlx_moecache.console.cache_picture import BARS, LayerPicture, cache_lines, sparkline
from mlx_moecache.console.columns import side_by_side, width_of, wrap
from mlx_moecache.stats import CacheStats, PhaseStats


def layer(hits: int | None, *, slots: int = 20, experts: int = 60, scale: int = 1) -> LayerPicture:
    """A layer with so many hits per hundred selections at decode; None: it counted nothing."""
    if hits is None:
        return LayerPicture(slots, experts, slots, CacheStats())
    decode = PhaseStats(
        selections=100 * scale,
        hits=hits * scale,
        misses=(100 - hits) * scale,
        loads=(100 - hits) * scale,
        bytes_read=(100 - hits) * scale * 23_000,
        evictions=(100 - hits) * scale,
    )
    return LayerPicture(slots, experts, slots, CacheStats(PhaseStats(), decode))


def picture(*layers: LayerPicture, width: int = 40, plain: bool = False) -> list[str]:
    return cache_lines(layers, eviction="lru", slot_bytes=2_760_000, width=width, plain=plain)


def test_bars_grow_with_the_rate_and_their_ends_are_all_and_nothing() -> None:
    assert sparkline([i / 8 for i in range(8)], plain=False) == BARS
    assert sparkline([0.0, 1.0, 0.999, 0.124, None], plain=False) == "▁██▁·"


def test_digits_are_tenths_where_the_encoding_has_no_bars() -> None:
    assert sparkline([0.0, 0.09, 0.1, 0.55, 0.99, 1.0, None], plain=True) == "001599-"
    assert all(line.isascii() for line in picture(layer(90), layer(None, slots=60), plain=True))


def test_the_figures_are_those_of_all_layers_and_the_lowest_layer_is_named() -> None:
    lines = picture(layer(90), layer(50), layer(80))
    assert lines[0] == "decode    73.3% of 300 hit"
    assert lines[1].strip() == "█▅▇"
    assert lines[2].strip() == "lowest 50.0%, layer 2 of 3"
    assert [x.strip() for x in lines[3:5]] == ["1.84 MB read", "80 evicted"]
    assert "prefill   nothing yet" in lines
    assert "slots     20 of 60 per layer, lru" in lines
    assert "          2.76 MB, 60 of 60 taken" in lines
    assert lines[-1] == "layers    ▁ 0% to █ 100% hit"


def test_a_layer_that_counts_nothing_is_marked_and_explained_and_never_the_lowest() -> None:
    lines = picture(layer(None, slots=60), layer(70))
    assert lines[1].strip() == "·▆" and lines[2].strip() == "lowest 70.0%, layer 2 of 2"
    assert lines[-1].strip() == "· nothing counted"


def test_before_the_first_reply_there_are_no_bars_to_explain() -> None:
    lines = picture(layer(None), layer(None))
    assert lines[:2] == ["decode    nothing yet", "prefill   nothing yet"] and len(lines) == 4


def test_a_model_that_is_all_in_memory_counts_nothing_and_says_so() -> None:
    lines = picture(layer(None, slots=60), layer(None, slots=60))
    assert lines[0] == "experts   all in memory: nothing to count"
    assert not any("nothing yet" in line for line in lines)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("layers", [1, 6, 29, 30, 94])
def test_no_line_needs_more_than_40_columns(layers: int, plain: bool) -> None:
    lines = picture(*(layer(13 + i % 80, slots=100, experts=384, scale=999_999) for i in range(layers)), plain=plain)
    assert max(map(width_of, lines)) <= 40
    marks = set("0123456789") if plain else set(BARS)
    bars = [x.strip() for x in lines if x.startswith(" " * 10) and set(x.strip()) <= marks]
    assert len("".join(bars)) == layers, "every layer has its bar"


def test_a_wide_terminal_shows_all_layers_in_one_row() -> None:
    assert "█" * 94 in [x.strip() for x in picture(*(layer(100) for _ in range(94)), width=120)]


# ---- text in columns ----


def test_wrapping_keeps_every_word_and_every_line_fits() -> None:
    text = "The fox   ran.\n\nIt saw a looooooooooooooooooooooooooooooong log"
    lines = wrap(text, 12)
    assert max(map(width_of, lines)) <= 12 and "" in lines
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_wide_and_joining_characters_are_counted_as_terminals_do() -> None:
    assert width_of("狐狸") == 4 and width_of("e\u0301") == 1 and width_of("👍") == 2
    lines = wrap("狐" * 9, 5)
    assert [width_of(x) for x in lines] == [4, 4, 4, 4, 2]
    joined = side_by_side(["狐狸", "fox"], ["a", "b"], 13)
    assert len({width_of(x.partition("|")[0]) for x in joined}) == 1


def test_what_a_model_writes_cannot_move_the_cursor() -> None:
    assert wrap("a\x1b[2Jb\rc", 40) == ["a [2Jb c"]


def test_columns_of_unequal_length_end_where_the_longer_one_does() -> None:
    assert side_by_side(["a", "b"], ["c"], 9) == ["a   | c", "b   |"]
