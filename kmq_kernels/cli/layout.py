"""Help pages and tables as plain text of a given width: names and numbers are folded or moved, never cut."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

MARGIN = 30  # where the sentences of a help page begin
NARROW = 24  # a first column is not folded to less
_BREAKS = re.compile(r"(?<=[./\\_,-])")


def width() -> int:
    """Columns of the terminal, or what COLUMNS says; 80 in a pipe or file."""
    return max(shutil.get_terminal_size((80, 24)).columns, 40)


def bold(text: str) -> str:
    """`text` in bold where standard output is a terminal that shows it and NO_COLOR does not forbid it."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty()
    return text if plain or not text else f"\033[1m{text}\033[0m"


def fold(text: str, columns: int) -> list[str]:
    """Lines of at most `columns`, broken at spaces, and inside a word that is longer behind a separator of names."""
    lines = [""]
    for word in text.split():
        gap = " " if lines[-1] else ""
        if len(lines[-1]) + len(gap) + len(word) <= columns:
            lines[-1] += gap + word
            continue
        if lines[-1]:
            lines.append("")
        for piece in _BREAKS.split(word):
            if lines[-1] and len(lines[-1]) + len(piece) > columns:
                lines.append("")
            while len(piece) > columns:
                lines[-1], piece = piece[:columns], piece[columns:]
                lines.append("")
            lines[-1] += piece
    return lines


def paragraphs(text: str, columns: int, indent: str = "") -> list[str]:
    """Wrapped paragraphs; an empty line stays between them."""
    blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n", text.strip())]
    fill = [textwrap.wrap(b, columns - len(indent), break_long_words=False, break_on_hyphens=False) for b in blocks if b]
    return "\n\n".join("\n".join(indent + line for line in lines) for lines in fill).split("\n")


def entry(name: str, sentence: str, columns: int) -> list[str]:
    """An option or command with its sentence beside it, or below where the name is long."""
    # "[default: 64]" stays in one line.
    glued = re.sub(r"\[default: \S+\]", lambda found: found[0].replace(" ", "\0"), sentence)
    wrapped = textwrap.wrap(glued, columns - MARGIN, break_long_words=False, break_on_hyphens=False)
    lines = [line.replace("\0", " ") for line in wrapped]
    if len(name) > MARGIN - 4:
        return [f"  {name}", *(" " * MARGIN + line for line in lines)]
    first, *rest = lines or [""]
    return [f"  {name:<{MARGIN - 2}}{first}".rstrip(), *(" " * MARGIN + line for line in rest)]


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    title: str = "",
    left: int = 1,
    total: int | None = None,
    blocks: bool = True,
) -> str:
    """A table: headings wrap at spaces, the first column folds, and where that is not enough a row becomes a block of lines.

    left: so many columns are text, set to the left; the others are numbers. total: columns of the screen. blocks: whether rows
    may become blocks; else nothing is given.
    """
    total = width() if total is None else total
    cells = [[str(cell) for cell in row] for row in rows]
    wide = [
        max([len(word) for word in heading.split()] + [len(row[i]) for row in cells] or [0]) for i, heading in enumerate(columns)
    ]
    rest = sum(wide[1:]) + 2 * (len(columns) - 1)
    lines = [bold(line) for line in fold(title, total)] if title else []
    if rest + min(wide[0], NARROW) > total:
        return "\n".join([*lines, *_blocks(columns, cells, total)]) if blocks else ""
    wide[0] = min(wide[0], total - rest)
    headings = [
        textwrap.wrap(heading, max(size, 1), break_long_words=False) or [""] for heading, size in zip(columns, wide, strict=True)
    ]
    height = max(map(len, headings))
    for k in range(height):
        parts = [heading[k - height + len(heading)] if k >= height - len(heading) else "" for heading in headings]
        lines.append(bold(_line(parts, wide, left)))
    lines.append(_line(["-" * size for size in wide], wide, left))
    for row in cells:
        name = fold(row[0], wide[0])
        lines.append(_line([name[0], *row[1:]], wide, left))
        lines += [f"  {more}" if len(more) + 2 <= wide[0] else more for more in name[1:]]
    return "\n".join(lines)


def _line(parts: Sequence[str], wide: Sequence[int], left: int) -> str:
    aligned = ["<"] * left + [">"] * len(parts)
    placed = [f"{part:{side}{size}}" for part, size, side in zip(parts, wide, aligned, strict=False)]
    return "  ".join(placed).rstrip()


def _blocks(columns: Sequence[str], cells: Sequence[Sequence[str]], total: int) -> list[str]:
    lines = []
    for row in cells:
        lines += [bold(line) for line in fold(row[0], total)]
        for heading, cell in zip(columns[1:], row[1:], strict=True):
            if cell:
                lines += [f"  {line}" for line in fold(f"{heading}: {cell}", total - 2)]
    return lines


def pairs(rows: Iterable[tuple[str, Any]], title: str = "") -> str:
    """Names and what they are, two columns, the second folded."""
    found = [(name, str(value)) for name, value in rows]
    margin = max(len(name) for name, _ in found) + 2
    lines = [bold(line) for line in fold(title, width())] if title else []
    for name, value in found:
        first, *more = fold(value, max(width() - margin, 20))
        lines += [f"{name:<{margin}}{first}", *(" " * margin + line for line in more)]
    return "\n".join(lines)
