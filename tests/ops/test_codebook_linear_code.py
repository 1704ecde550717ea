"""The compiled loops of the linear layer, read from the extension with objdump."""

import re
import shutil
import subprocess

import pytest

import kmq_kernels as kmq

pytestmark = [
    pytest.mark.skipif(isinstance(kmq.build_info()["extension"], str), reason="the extension is not built"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not there"),
]
TILES = {"GemmAvx2": 2, "GemmAvx512": 3}  # path: heights of its register tile


@pytest.fixture(scope="module")
def functions():
    """Instructions of every function that names a vector path, by its demangled name."""
    from kmq_kernels import _C

    command = ["objdump", "-d", "-C", "-w", "--no-show-raw-insn", _C.__file__]
    found, lines = {}, None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.endswith(">:\n"):
                name = line.partition("<")[2][:-3]
                lines = found.setdefault(name, []) if re.search(r"[Aa]vx(2|512)|turned_|vnni|list_outside", name) else None
            elif lines is not None and "\t" in line:
                lines.append(line.rstrip())
    if not any("tile_of" in name for name in found):
        pytest.skip("no x86-64 kernels in this build, or no symbols")
    return found


def fma_loops(lines, multiply="vfmadd"):
    """The stretches between a backward jump and its target that multiply, the shortest first."""
    index = {int(line.partition(":")[0], 16): i for i, line in enumerate(lines)}
    loops = []
    for i, line in enumerate(lines):
        jump = re.search(r"\tj\w+ +([0-9a-f]+) <", line)
        start = index.get(int(jump[1], 16)) if jump else None
        if start is not None and start < i and any(multiply in x for x in lines[start:i]):
            loops.append(lines[start : i + 1])
    return sorted(loops, key=len)


def test_avx2_functions_use_no_avx512_register(functions):
    avx2 = {name: lines for name, lines in functions.items() if re.search(r"[Aa]vx2", name) and not re.search(r"[Aa]vx512", name)}
    assert avx2
    for name, lines in avx2.items():
        wrong = [line for line in lines if re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]", line)]
        assert not wrong, (name, wrong[:3])


def spills(loop):
    """Vector registers written to the stack and read back as such. Reads alone are tables and constants that have no register;
    what is written for scalar loads (the indices of 7 and 8 bits on AVX2) is no register that was missing."""
    slots = [found[1] for line in loop if (found := re.search(r"%[xyz]mm\d+,([^,]*\(%r[sb]p)\)", line))]
    reads = [line for line in loop if re.search(r"[^,]*\(%r[sb]p\).*%[xyz]mm\d+$", line)]
    return [slot for slot in slots if any(re.search(rf"[\s,]{re.escape(slot)}\)", line) for line in reads)]


def fused_loop(functions, name):
    """The loop over whole blocks: of those that multiply the one that prefetches."""
    (lines,) = [lines for found, lines in functions.items() if f"{name}(" in found]
    return next(loop for loop in fma_loops(lines) if any("prefetch" in line for line in loop))


def test_a_spill_is_found():
    stored, loaded = "\tvmovaps %ymm3,0x20(%rsp)", "\tvaddps 0x20(%rsp),%ymm1,%ymm2"
    assert spills([stored, loaded]) == ["0x20(%rsp"]
    assert not spills([stored, "\tmov    0x20(%rsp),%rax"])
    assert not spills([loaded, "\tvmovaps %ymm3,0x120(%rsp)"])


@pytest.mark.parametrize(("bits", "rows"), [(bits, rows) for bits in range(1, 9) for rows in range(1, 6 if bits == 6 else 9)])
def test_fused_avx2_loops_spill_nothing(functions, bits, rows):
    loop = fused_loop(functions, f"DotAvx2::rows<{bits}, {rows}>")
    assert sum("vfmadd" in line for line in loop) == 16 * rows
    assert not spills(loop)


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("bits", range(1, 8))
def test_fused_avx512_loops_keep_their_sums_in_registers(functions, bits, rows):
    loop = fused_loop(functions, f"DotAvx512::rows<{bits}, {rows}>")
    assert sum("vfmadd" in line for line in loop) == 8 * rows
    assert not spills(loop)


@pytest.mark.parametrize("bits", range(1, 7))
def test_turned_avx512_loops_keep_their_sums_in_registers(functions, bits):
    """The tiles of 8, 12 and 16 rows, inlined or not."""
    found = [lines for name, lines in functions.items() if re.search(rf"turned_(rows<{bits}>|tile<{bits}, \d+>)\(", name)]
    loops = [loop for lines in found for loop in fma_loops(lines) if any("prefetch" in line for line in loop)]
    inner = [loop for loop in loops if not any(other[0] in loop[1:] for other in loops)]
    assert {sum("vfmadd" in line for line in loop) for loop in inner} == {8 * 8, 8 * 12, 8 * 16}
    assert not [spills(loop) for loop in inner if spills(loop)]


@pytest.mark.parametrize("path", TILES)
def test_tiles_keep_their_sums_in_registers(functions, path):
    tiles = {name: lines for name, lines in functions.items() if f"{path}::tile_of<" in name and "mm" in "".join(lines)}
    assert len(tiles) >= TILES[path]
    for name, lines in tiles.items():
        loop = fma_loops(lines)[0]
        assert sum("vfmadd" in line for line in loop) >= 8, name
        assert not [line for line in loop if re.search(r"%[xyz]mm.*\(%r[sb]p|\(%r[sb]p.*%[xyz]mm", line)], name


@pytest.mark.parametrize(
    ("tile", "multiply", "rows"),
    [
        (r"tile_vnni<12>", "vpdpbusd", 12),
        (r"tile_avx2<6, .*MultiplyAdd>", "vpmaddwd", 6),
        (r"tile_avx2<6, .*MultiplyAddVnni>", "vpdpwssd", 6),
    ],
    ids=["vnni", "avx2", "avxvnni"],
)
def test_integer_tiles_keep_their_sums_in_registers(functions, tile, multiply, rows):
    """Of the tallest tile."""
    (lines,) = [lines for name, lines in functions.items() if re.search(rf"{tile}\(", name)]
    loop = fma_loops(lines, multiply)[0]
    assert sum(multiply in line for line in loop) == 2 * rows
    assert not spills(loop)


def test_no_mask_is_spilled_narrow_and_read_back_wide(functions):
    """GCC 12.2 does so with a mask of 16 lanes that is widened to 32 bits, and half of what comes back is anything."""
    assert "list_outside" in " ".join(functions)
    narrow = re.compile(r"kmov[wb] +%k\d,([^,]*\(%r[sb]p)\)")
    for name, lines in functions.items():
        slots = {found[1] for line in lines if (found := narrow.search(line))}
        wide = [line for line in lines for slot in slots if re.search(rf"\t(mov|bsf|tzcnt|popcnt)l? +{re.escape(slot)}\)", line)]
        assert not wide, (name, wide[:3])
