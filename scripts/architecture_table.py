"""The README's table of model types, made from mlx_moecache/architectures.py.

python scripts/architecture_table.py            prints it
python scripts/architecture_table.py --write    puts it into README.md, between the two comments
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from mlx_moecache.architectures import (
    CLASS_RENAMES,
    FAMILIES,
    RAW_LAYOUTS,
    RENAMES,
    SUPPORTED,
    UNSUPPORTED,
    Architecture,
)
from mlx_moecache.console.command import run
from mlx_moecache.errors import UsageError

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- model types: begin -->", "<!-- model types: end -->"

FORMATS = (
    "Experts may be float32, affine with 3, 4, 6 or 8 bits, mxfp4, mxfp8 or nvfp4, mixed by layer and by projection, "
    "with or without biases; float16 and bfloat16 need a GPU, because MLX's `gather_mm` on the CPU is float32 only; "
    "nvfp4 with a global scale for each expert needs one, too."
)


def table() -> str:
    """The section's Markdown, without a line break at its end."""
    lines = [
        "| router | the bias ranks by | model types |",
        "| --- | --- | --- |",
        *(f"| {title} | {z} | {types} |" for title, z, types in _families()),
        "",
        "g: router logits; s: sigmoid, softmax or sqrt(softplus) of g; b: correction bias. † the router may rule out "
        "groups of experts, which are then never chosen for being cached. *Italics*: dense unless the config says "
        "otherwise.",
        "",
        *(f"- {note}" for note in _notes()),
        "",
        FORMATS,
        "",
        "mlx's own layout (stacked by expert) is read in place for all of them. Checkpoints that were not converted:",
        "",
        "| Hugging Face layout | read in place | model types |",
        "| --- | --- | --- |",
        *(f"| {layout} | {answer} | {types} |" for layout, answer, types in _layouts()),
    ]
    return "\n".join(lines)


def _families() -> list[tuple[str, str, str]]:
    rows = []
    for family in FAMILIES.values():
        members = [a for a in _sorted() if a.family == family.name and a.bias]
        if members:
            rows.append((family.title, f"`{family.z}`", ", ".join(_label(a) for a in members)))
    exact = [_label(a) for a in _sorted() if not a.bias]
    if exact:
        rows.append(("any", "exact only", ", ".join(exact)))
    rows.append(("any", "refused", ", ".join(sorted(UNSUPPORTED))))
    return rows


def _label(architecture: Architecture) -> str:
    """The type with its marks, and the names in config.json that mlx-lm maps to it."""
    name = architecture.model_type
    others = [old for old, new in RENAMES.items() if new == name]
    others += [f"{old} of class {cls}" for (old, cls), new in CLASS_RENAMES.items() if new == name]
    label = f"*{name}*" if architecture.sometimes else name
    label += "†" if architecture.groups else ""
    return label + (f" (also {', '.join(others)})" if others else "")


def _notes() -> list[str]:
    """One line per remark, the types that share it together."""
    remarks: dict[str, list[str]] = {}
    for a in _sorted():
        if a.note:
            remarks.setdefault(a.note, []).append(a.model_type)
    for name, reason in UNSUPPORTED.items():
        remarks.setdefault(f"refused, {reason}", []).append(name)
    return [f"{', '.join(names)}: {remark}." for remark, names in remarks.items()]


def _layouts() -> list[tuple[str, str, str]]:
    rows = []
    for layout in RAW_LAYOUTS.values():
        members = [a.model_type for a in _sorted() if layout.name in a.raw]
        answer = "yes" if layout.in_place else "no: `mlx_lm.convert`"
        rows.append((layout.description, answer, ", ".join(members)))
    return rows


def _sorted() -> list[Architecture]:
    return sorted(SUPPORTED.values(), key=lambda a: a.model_type.lower())


def embedded(text: str) -> str | None:
    """What stands between the two comments of a README; None if they are not there once each and in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        return None
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip("\n")


def write(readme: Path) -> bool:
    """Put the table between the comments of `readme`; False if it has no such place."""
    text = readme.read_text(encoding="utf-8")
    if embedded(text) is None:
        return False
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    temporary = readme.with_name(f".{readme.name}.new")
    temporary.write_text(f"{before}{BEGIN}\n{table()}\n{after}", encoding="utf-8")
    os.replace(temporary, readme)
    return True


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put it into README.md instead of printing it")
    if not parser.parse_args().write:
        print(table())
        return 0
    if not write(README):
        raise UsageError(f"README.md has no {BEGIN} and {END}; add these two lines where the table belongs")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
