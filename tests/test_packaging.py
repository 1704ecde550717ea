"""What people install from: the sdist of a clean export holds all that a build needs; what is built from it works elsewhere."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

# Outside the repository: clustering, packing, a model quantized in place, saved and loaded again.
TEN_LINES = """
import torch, transformers, kmq_kernels as kmq
result = kmq.kmeans(torch.arange(12.0).repeat(50), 4)
assert torch.equal(result.centroids, torch.tensor([1.0, 4.0, 7.0, 10.0]))
assert torch.equal(kmq.unpack(kmq.pack(result.assignments, 2), 2, 600), result.assignments)
sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
model = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
kmq.quantize_(model, kmq.KMQConfig(bits=3))
model.save_pretrained("packed")
ids = torch.arange(20)[None]
assert torch.equal(kmq.load("packed").eval()(ids)[0], model(ids)[0])
"""
WHERE = 'print(kmq.__file__, kmq.build_info()["ops"]["codebook_linear"]["cpu"], sep="\\n")'


def _tracked():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout of the repository")
    out = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in out.split("\0") if name and (ROOT / name).is_file()]


def _backend(call, folder):
    """A hook of the build backend, as pip calls it without build isolation. CUDA is left out: the sdist must not depend on it."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"KMQ_CUDA": "0"}
    code = f"from setuptools import build_meta; build_meta.{call}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The sdist of a copy of the tracked files."""
    folder = tmp_path_factory.mktemp("export")
    for name in _tracked():
        (folder / "clean" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "clean" / name)
    _backend("build_sdist('../dist')", folder / "clean")
    (archive,) = (folder / "dist").glob("kmq_kernels-*.tar.gz")
    return archive


def test_sdist_holds_every_tracked_file(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = set(_tracked()) - names - {".gitignore"}
    assert not missing
    # The kinds that setuptools leaves out by itself.
    for suffix in (".h", ".cu", ".cpp", ".csv", ".md", ".svg"):
        assert any(name.endswith(suffix) for name in names), suffix
    assert "csrc/cuda/codebook_grad.cu" in names
    assert "tests/cuda_on_cpu.h" in names


@pytest.mark.slow
def test_wheel_of_the_sdist_works_elsewhere(sdist, tmp_path):
    """Builds in an empty folder, installs into a fresh environment that sees the installed torch, runs outside the repository,
    with no compiler on the PATH."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    _backend("build_wheel('../../dist')", source)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for needed in ("py.typed", "tasks/banking77/test.csv", "tasks/banking77/ATTRIBUTION.md", "report/report.js"):
        assert f"kmq_kernels/{needed}" in names
    assert any(name.startswith("kmq_kernels/_C.") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/", "docs/")) for name in names)
    shutil.rmtree(tmp_path / "source")
    run_elsewhere(wheel, tmp_path)


def run_elsewhere(wheel, folder):
    """Installs a wheel into a fresh environment that sees the installed torch; runs the ten lines there without a compiler."""
    venv.create(folder / "venv", with_pip=True)
    (site,) = (folder / "venv/lib").glob("python*/site-packages")
    (site / "torch_of_the_tests.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    binaries = folder / "venv/bin"
    environment = {"PATH": str(binaries), "HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "check": False}
    pip = [binaries / "python", "-m", "pip", "install", "-q", "--no-index", "--no-deps", wheel]
    done = subprocess.run(pip, **options)
    assert done.returncode == 0, done.stderr
    assert shutil.which("c++", path=environment["PATH"]) is None
    done = subprocess.run([binaries / "python", "-c", TEN_LINES + WHERE], **options)
    assert done.returncode == 0, done.stderr
    where, path = done.stdout.splitlines()[-2:]
    assert Path(where).is_relative_to(folder)
    assert path.startswith("C++")
    done = subprocess.run([binaries / "kmq", "--version"], **options)
    assert done.returncode == 0, done.stderr
