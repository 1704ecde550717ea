"""Compiles Triton kernels for a GPU that is not here, and counts what came out.

`compile_all` runs in a process of its own, because this one may have the interpreter switched on. What is compiled stays in
Triton's cache, so that a second run is quick.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90)  # what the tests of the default run compile for
NEWER = (100, 120)  # Blackwell's two; in the default run a few kernels
# Most shared memory of a thread block, bytes.
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
PRODUCT = r"\b(HMMA|QMMA|HGMMA|QGMMA|UTC\w*MMA)\b"  # instructions of the tensor cores, on any architecture


@dataclass(frozen=True)
class Kernel:
    """What to compile.

    kernel: "module:function". signature: type of each argument that is not a constexpr, in the order of the parameters ("*fp32",
    "i64", ...). constexprs: values of the others; a dtype is "tl.float16". aligned: arguments that are multiples of 16, as
    pointers of torch are.
    """

    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    debug: bool | None = None


@dataclass(frozen=True)
class Compiled:
    """registers: per thread. spills: local loads and stores in the code. shared: bytes. sass: (address, instruction) lines."""

    registers: int
    spills: int
    shared: int
    sass: list[tuple[int, str]]

    def count(self, pattern: str) -> int:
        """Instructions that match a regular expression."""
        return sum(bool(re.search(pattern, text)) for _, text in self.sass)

    def loops(self) -> list[list[str]]:
        """The bodies of all loops: what lies between a backward branch and its target, the longest first."""
        found = []
        for at, text in self.sass:
            branch = re.search(r"\bBRA(?:\.\S+)?\s.*?(0x[0-9a-f]+)", text)
            if branch and int(branch[1], 16) < at:
                found.append([line for address, line in self.sass if int(branch[1], 16) <= address <= at])
        return sorted(found, key=len, reverse=True)

    def _blocks(self) -> tuple[dict[int, int], dict[int, list[int]]]:
        """Blocks, code without a branch or a target of one: the end of each by its start, and the starts that may follow."""
        starts, targets = {0}, {}
        index = {address: i for i, (address, _) in enumerate(self.sass)}
        for i, (_, text) in enumerate(self.sass):
            branch = re.search(r"\bBRA(?:\.\S+)?\s.*?(0x[0-9a-f]+)", text)
            if branch and int(branch[1], 16) in index:
                targets[i] = index[int(branch[1], 16)]
                starts.add(targets[i])
            if re.search(r"\b(BRA|EXIT)\b", text):
                starts.add(i + 1)
        order = sorted(starts - {len(self.sass)})
        ends = dict(zip(order, [*order[1:], len(self.sass)], strict=True))
        follow: dict[int, list[int]] = {}
        for start, end in ends.items():
            last = self.sass[end - 1][1]
            follow[start] = [targets[end - 1]] if end - 1 in targets else [len(self.sass)] if "EXIT" in last else []
            if last.startswith("@") or re.search(r"\bBRA\S*\s+!?UP\d", last) or not re.search(r"\b(BRA|EXIT)\b", last):
                follow[start].append(end)
        return ends, follow

    def executed(self, pattern: str) -> int:
        """Instructions run from the first to an exit on the shortest way through the block with most matches of a pattern.

        A block is code without a branch or a target of one: the way is that of a program for which all other branches skip what
        they can.
        """
        ends, follow = self._blocks()

        def lengths(start: int) -> dict[int, int]:
            found, open_ = {start: 0}, [start]
            while open_:
                block = open_.pop()
                for after in follow.get(block, []):
                    length = found[block] + ends[block] - block
                    if length < found.get(after, length + 1):
                        found[after] = length
                        open_.append(after)
            return found

        middle = max(ends, key=lambda start: sum(bool(re.search(pattern, text)) for _, text in self.sass[start : ends[start]]))
        return lengths(0)[middle] + lengths(middle)[len(self.sass)]

    def innermost_loops(self) -> list[list[str]]:
        """The loops that hold no other loop, the longest first."""
        return [body for body in self.loops() if sum(bool(re.search(r"\bBRA\b", line)) for line in body) == 1]

    def product_loop(self) -> list[str]:
        """All code that runs again and again around products of matrices: of the loops with the most products, every block from
        which the others and it can be reached, wherever it lies. (Waits for a barrier lie behind the end, on sm_100.)"""
        ends, follow = self._blocks()

        def reached(start: int) -> set[int]:
            found: set[int] = set()
            open_ = [start]
            while open_:
                new = set(follow.get(open_.pop(), [])) - found
                found |= new
                open_ += new
            return found

        after = {start: reached(start) for start in ends}
        loops: list[list[str]] = []
        for start in ends:
            blocks = sorted(block for block in ends if block in after[start] and start in after[block])
            if blocks and blocks[0] == start:
                loops.append([text for block in blocks for _, text in self.sass[block : ends[block]]])
        return max(loops, key=lambda body: (sum(bool(re.search(PRODUCT, line)) for line in body), len(body)))


def compile_all(kernels: list[Kernel], architecture: int) -> list[Compiled]:
    """Compiles for sm_<architecture>, all in one process."""
    root = Path(__file__).parent.parent
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(root), str(root / "tests"), str(root / "tests" / "triton"), os.environ.get("PYTHONPATH", "")]
    )
    request = json.dumps([architecture, [vars(kernel) for kernel in kernels]])
    done = subprocess.run([sys.executable, __file__], env=environment, input=request, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return [
        Compiled(one["registers"], one["spills"], one["shared"], [(at, text) for at, text in one["sass"]])
        for one in json.loads(done.stdout.splitlines()[-1])
    ]


def _compile(kernel: dict[str, Any], architecture: int) -> dict[str, Any]:
    import importlib

    import triton
    import triton.language as tl
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = kernel["kernel"].partition(":")
    function = getattr(importlib.import_module(module), name)
    names = function.arg_names
    signature = {arg: "constexpr" if arg in kernel["constexprs"] else kernel["signature"][arg] for arg in names}
    attributes = {(names.index(arg),): [["tt.divisibility", 16]] for arg in kernel["aligned"]}
    constexprs = {
        arg: getattr(tl, value[3:]) if isinstance(value, str) and value.startswith("tl.") else value
        for arg, value in kernel["constexprs"].items()
    }
    source = ASTSource(function, signature, constexprs, attributes)
    options = {key: kernel[key] for key in ("num_warps", "num_stages", "maxnreg", "debug") if kernel[key] is not None}
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        listing = subprocess.run([tools / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    sass = [(int(at, 16), text.strip()) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", listing)]
    while sass and re.match(r"NOP|BRA " + hex(sass[-1][0]), sass[-1][1]):
        sass.pop()  # padding behind the code
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": sum(bool(re.search(r"\b(LDL|STL)\b", text)) for _, text in sass),
        "shared": built.metadata.shared,
        "sass": sass,
    }


if __name__ == "__main__":
    wanted_architecture, wanted = json.load(sys.stdin)
    print(json.dumps([_compile(kernel, wanted_architecture) for kernel in wanted]))
