"""The rooms and their imports: they point one way, and importing has no side effect."""

import ast
import subprocess
import sys
from pathlib import Path

import kmq_kernels

PACKAGE = Path(kmq_kernels.__file__).parent

# Module -> what it may import from the package.
ALLOWED = {
    "packing": set(),
    "reference": {"packing"},
    "ops": {"packing", "reference", "triton_kernels"},
    "config": {"clustering"},
    "clustering": {"packing", "reference", "ops"},
    "modules": {"packing", "reference", "ops"},
    "decode_ahead": {"modules", "triton_kernels"},
    "encoding": {"clustering", "config", "ops", "packing"},
    "allocation": {"config", "encoding"},
    "quantize": {"allocation", "encoding", "modules", "config"},
    "sensitivity": {"quantize", "config"},
    "tensor_files": set(),
    "ranks": set(),
    "hf_quantizer": {"quantize", "modules", "config", "tensor_files"},
    "hf": {"hf_quantizer", "tensor_files"},
    "checkpoint_model": {"config", "tensor_files"},
    "checkpoint_plan": {"checkpoint_model", "quantize", "config", "ops", "tensor_files"},
    "checkpoint_stream": {"checkpoint_plan", "encoding", "tensor_files"},
    "checkpoint": {"checkpoint_plan", "checkpoint_stream", "hf", "ops", "ranks", "tensor_files"},
    "tasks": set(),
    "pipeline": {"quantize", "modules", "config", "hf", "sensitivity", "tasks", "tensor_files"},
    "comparison": {"config", "pipeline", "tasks"},
    "report": set(),
    "cli_options": set(),
    "cli_checkpoint": {"checkpoint", "checkpoint_plan", "cli_options", "config", "pipeline", "ranks"},
    "cli": {
        "cli_checkpoint", "cli_options", "comparison", "config", "hf", "modules", "ops", "pipeline", "quantize", "ranks",
        "report", "tasks",
    },
}


def _imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("kmq_kernels"):
            found |= set(node.module.split(".")[1:2])
    return found - {"__version__", "utils"}


def test_every_module_is_in_the_table_and_imports_only_what_it_may():
    modules = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    assert set(modules) <= set(ALLOWED)
    for name, path in modules.items():
        assert _imports(path) <= ALLOWED[name], name


def test_kernels_import_nothing_of_the_package():
    for path in (PACKAGE / "triton_kernels").glob("*.py"):
        assert _imports(path) <= {"packing", "triton_kernels"} | {p.stem for p in path.parent.glob("*.py")}, path


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
