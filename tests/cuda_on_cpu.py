#!/usr/bin/env python3
"""Rewrites a .cu file for cuda_on_cpu.h: `k<<<grid, block, bytes, stream>>>(args);` and `extern __shared__ T name[];`."""

import argparse
import re


def _close(text: str, start: int, pair: str) -> int:
    """Index just past the bracket that closes text[start]."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == pair[0]) - (text[i] == pair[1])
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced {pair} from {start}")


def _kernel_start(text: str, end: int) -> int:
    """Start of the kernel expression (name, namespaces, template arguments) that ends at `end`."""
    i = end
    while i > 0 and text[i - 1].isspace():
        i -= 1
    if text[i - 1] == ">":
        depth = 0
        while i > 0:
            i -= 1
            depth += (text[i] == ">") - (text[i] == "<")
            if depth == 0:
                break
    while i > 0 and (text[i - 1].isalnum() or text[i - 1] in "_:"):
        i -= 1
    return i


def rewrite(text: str) -> str:
    text = re.sub(
        r"extern\s+__shared__\s+(?:__align__\(\d+\)\s+|alignas\(\d+\)\s+)?([\w: ]+?)\s+(\w+)\s*\[\s*\]\s*;",
        r"\1* \2 = static_cast<\1*>(emu::dynamic_shared());",
        text,
    )
    while (at := text.find("<<<")) >= 0:
        end = text.index(">>>", at)
        config = text[at + 3 : end]
        parts, depth, part = [], 0, ""
        for ch in config:
            depth += (ch in "([{<") - (ch in ")]}>")
            if ch == "," and depth == 0:
                parts.append(part)
                part = ""
            else:
                part += ch
        parts.append(part)
        opening = text.index("(", end)
        closing = _close(text, opening, "()")
        begin = _kernel_start(text, at)
        shared = parts[2] if len(parts) > 2 else "0"
        call = f"emu::run(dim3({parts[0]}), dim3({parts[1]}), {shared}, [&] {{ {text[begin:at]}{text[opening:closing]}; }})"
        text = text[:begin] + call + text[closing:]
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("-o", "--output", required=True)
    arguments = parser.parse_args()
    with open(arguments.source) as source:
        text = rewrite(source.read())
    with open(arguments.output, "w") as output:
        output.write(text)
