"""An extension of griffe: a docstring in prose becomes Markdown.

What stands before a colon at the beginning of a sentence names a parameter or a field: it begins an item of a list. "Returns" and
"Raises" begin a paragraph. Everything else stays as it is written; characters that Markdown would take for marks are escaped.
"""

import itertools
import re
import textwrap
from typing import Any

from griffe import Extension, Object

NAMES = re.compile(r"(?:^|(?<=[.;] ))([a-z_]\w*(?:, [a-z_]\w*)*): ")
VERDICT = re.compile(r"(?<=[.;)\]}] )(?=(?:Returns|Raises) )")
CODE = re.compile(r"(`+[^`]*`+)")


class Prose(Extension):
    """Rewrites every docstring as it is read."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    paragraphs = re.split(r"\n[ \t]*\n", docstring.strip("\n"))
    return "\n\n".join(_paragraph(paragraph) for paragraph in paragraphs)


def _paragraph(text: str) -> str:
    lines = text.splitlines()
    if all(line.startswith("    ") for line in lines):
        return text  # code, or a drawing
    whole = " ".join(line.strip() for line in lines)
    parts = []
    for piece in VERDICT.split(whole):
        starts = [0, *(found.start() for found in NAMES.finditer(piece) if found.start()), len(piece)]
        for start, end in itertools.pairwise(starts):
            parts.append(_item(piece[start:end].strip()))
    return "\n\n".join(part for part in parts if part)


def _item(text: str) -> str:
    named = NAMES.match(text)
    if named is None:
        return _escaped(text)
    names = ", ".join(f"`{name}`" for name in named[1].split(", "))
    return textwrap.indent(f"{names}: {_escaped(text[named.end() :]).rstrip(';')}", "    ").replace("    ", "-   ", 1)


def _escaped(text: str) -> str:
    parts = CODE.split(text)
    return "".join(part if i % 2 else re.sub(r"([*_\[\]<>])", r"\\\1", part) for i, part in enumerate(parts))
