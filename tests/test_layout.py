"""The wings and their imports: they point one way, through the doors, and importing has no side effect."""

import ast
import subprocess
import sys
from pathlib import Path

import kmq_kernels

PACKAGE = Path(kmq_kernels.__file__).parent

# Wing -> the wings it may import from. A wing is a folder, or a single file at the top.
ALLOWED = {
    "imports": set(),
    "terminal": set(),
    "packing": set(),
    "files": {"imports"},
    "tasks": {"terminal"},
    "reference": {"packing"},
    "triton_kernels": {"packing"},
    "ops": {"packing", "reference", "triton_kernels"},
    "clustering": {"packing", "ops"},
    "layers": {"packing", "ops", "triton_kernels"},
    "quantization": {"terminal", "packing", "files", "ops", "clustering", "layers"},
    "sensitivity": {"terminal", "files", "quantization"},
    "hf": {"files", "layers", "quantization"},
    "checkpoint": {"files", "ops", "quantization", "hf"},
    "training": {"terminal", "files", "layers", "quantization", "sensitivity", "hf", "tasks"},
    "report": {"files"},
    "cli": {"terminal", "tasks", "files", "ops", "layers", "quantization", "hf", "checkpoint", "training", "report"},
}
OPEN = {"triton_kernels"}  # wings without a door: ops and layers name the file of a kernel


def _imports(path):
    """(wing, whether it is named through its door) for each import of another wing."""
    inside = path.relative_to(PACKAGE).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            target = [*inside[: len(inside) - node.level], *(node.module.split(".") if node.module else [])]
        elif (node.module or "").split(".")[0] == "kmq_kernels":
            target = node.module.split(".")[1:]
        else:
            continue
        if target:
            found.add((target[0], len(target) == 1))
        else:  # from .. import wing
            found |= {(alias.name, True) for alias in node.names if alias.name != "__version__"}
    return {(wing, door) for wing, door in found if wing != inside[0]}


def test_wings_import_only_what_they_may_and_through_the_doors():
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in files} == set(ALLOWED)
    for path in files:
        wing = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for target, door in _imports(path):
            assert target in ALLOWED[wing], f"{path}: {wing} may not import {target}"
            assert door or target in OPEN, f"{path}: import from the door of {target}"


def test_wings_hold_no_circle():
    done = set()
    for _ in ALLOWED:
        done |= {wing for wing, needs in ALLOWED.items() if needs <= done}
    assert done == set(ALLOWED)


def test_a_door_lists_what_it_lets_out():
    for init in PACKAGE.glob("*/__init__.py"):
        if init.parent.name in OPEN:
            continue
        module = sys.modules.get(f"kmq_kernels.{init.parent.name}") or __import__(
            f"kmq_kernels.{init.parent.name}", fromlist=["__all__"]
        )
        assert module.__doc__, init
        assert all(hasattr(module, name) for name in module.__all__), init


def test_only_bindings_see_torch():
    for path in (PACKAGE.parent / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu") and path.name != "bindings.cpp":
            text = path.read_text()
            assert "#include <torch" not in text, path
            assert "#include <ATen" not in text, path
            assert "#include <c10" not in text, path


def test_import_prints_nothing():
    done = subprocess.run([sys.executable, "-c", "import kmq_kernels"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_version_is_written_once():
    from importlib.metadata import version

    assert version("kmq_kernels") == kmq_kernels.__version__


def test_build_info_names_every_op():
    info = kmq_kernels.build_info()
    assert set(info["ops"]["dequantize"]) == {"cpu", "cuda"}
    assert "codebook_grad" in info["ops"]
