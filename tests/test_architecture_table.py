"""The table of model types: its data, and the README's copy of it."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_moecache.architectures import FAMILIES, RAW_LAYOUTS, SUPPORTED, UNSUPPORTED

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import architecture_table

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "architecture_table.py"


def test_the_readme_has_the_current_table() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert architecture_table.embedded(text) == architecture_table.table(), (
        "the README's table of model types is not that of mlx_moecache/architectures.py; "
        "run: python scripts/architecture_table.py --write"
    )


def test_every_type_names_a_family_and_layouts_that_exist() -> None:
    for a in SUPPORTED.values():
        assert a.family in FAMILIES, a.model_type
        assert set(a.raw) <= set(RAW_LAYOUTS), a.model_type
        assert set(a.raw_in_place) == {name for name in a.raw if RAW_LAYOUTS[name].in_place}
    assert {a.family for a in SUPPORTED.values()} == set(FAMILIES)
    assert {name for a in SUPPORTED.values() for name in a.raw} == set(RAW_LAYOUTS)
    assert not set(SUPPORTED) & set(UNSUPPORTED)


def test_every_type_is_once_in_the_first_table() -> None:
    first = architecture_table.table().split("\n\n")[0]
    cells = [re.sub(r" \(.*?\)", "", line.split(" | ")[-1]) for line in first.splitlines()[2:]]
    types = [label.strip(" |*†") for cell in cells for label in cell.split(", ")]
    assert sorted(types) == sorted([*SUPPORTED, *UNSUPPORTED])


def test_a_type_without_the_bias_and_a_refused_one_are_said_so() -> None:
    table = architecture_table.table()
    assert "| exact only | muse_spark |" in table
    assert "| refused | dbrx |" in table
    assert UNSUPPORTED["dbrx"] in table


def test_a_changed_type_changes_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    before = architecture_table.table()
    changed = dataclasses.replace(SUPPORTED["mixtral"], bias=False)
    monkeypatch.setitem(architecture_table.SUPPORTED, "mixtral", changed)
    assert "| exact only | mixtral, muse_spark |" in architecture_table.table() != before


def test_write_replaces_what_stands_between_the_comments_only(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{architecture_table.BEGIN}\nold\n{architecture_table.END}\n\nafter – end\n", "utf-8")
    assert architecture_table.write(readme)
    text = readme.read_text("utf-8")
    assert architecture_table.embedded(text) == architecture_table.table()
    assert text.startswith(f"before\n\n{architecture_table.BEGIN}\n| router")
    assert text.endswith(f"\n{architecture_table.END}\n\nafter – end\n")
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize("text", ["", architecture_table.BEGIN, f"{architecture_table.END}{architecture_table.BEGIN}"])
def test_a_readme_without_the_place_is_left_alone(tmp_path: Path, text: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text, "utf-8")
    assert not architecture_table.write(readme)
    assert readme.read_text("utf-8") == text


def test_the_command_prints_the_table() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == architecture_table.table() + "\n"
