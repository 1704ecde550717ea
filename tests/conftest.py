"""Shared fixtures: determinism, poisoned uninitialised memory, tiny models of every family."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Without a device, Triton kernels run in Triton's interpreter, which must be chosen before triton is imported.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import transformers  # noqa: E402


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty gives NaN (or the largest integer), so a lane that a kernel did not write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(scope="session")
def run_python():
    """run_python(code, **environment) -> the JSON that `code` prints last, from a process of its own."""

    def run(code, **environment):
        tests = Path(__file__).parent
        path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path, **environment}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def cpu_paths():
    """What KMQ_CPU_PATH may name on this processor, "scalar" first."""
    code = "import kmq_kernels as k; print(k.build_info()['extension']['cpu_path'])"
    found = []
    for path in ("scalar", "avx2", "avxvnni", "avx512", "amx"):
        env = {**os.environ, "KMQ_CPU_PATH": path}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
        if "this processor does not have it" in done.stderr:
            continue
        assert done.stdout.strip() == path, done.stderr
        found.append(path)
    return found


@pytest.fixture(scope="session")
def device():
    """Where the launchers of Triton kernels take their tensors from: "cuda", or "cpu" under the interpreter."""
    return DEVICE


def pytest_collection_modifyitems(config, items):
    # The tests of Triton kernels then run on the device; the dry run of `make gpu` lists them.
    if DEVICE == "cuda" or (config.option.collectonly and os.environ.get("KMQ_LIST_AS_ON_CUDA")):
        for item in items:
            if "device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)
    else:
        for item in items:
            if item.get_closest_marker("gpu"):  # not `in keywords`: the folder tests/gpu is one
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


_SMALL = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}

FAMILIES = {
    "bert": ("BertConfig", {}),
    "roberta": ("RobertaConfig", {"pad_token_id": 1}),
    "distilbert": ("DistilBertConfig", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "albert": ("AlbertConfig", {"embedding_size": 16}),
    "electra": ("ElectraConfig", {"embedding_size": 16}),
    "mpnet": ("MPNetConfig", {"pad_token_id": 1}),
    "deberta-v2": (
        "DebertaV2Config",
        {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm",
         "share_att_key": True, "position_biased_input": False, "pooler_hidden_size": 32},
    ),
}  # fmt: skip


def family_config(family, **options):
    """A small random configuration of a family, three labels."""
    name, own = FAMILIES[family]
    common = {} if family == "distilbert" else _SMALL
    base = {"vocab_size": 120, "max_position_embeddings": 40, "num_labels": 3}
    return getattr(transformers, name)(**{**base, **common, **own, **options})


def family_model(family, head="SequenceClassification", **options):
    """A small random model of a family in eval mode."""
    torch.manual_seed(1)
    config = family_config(family, **options)
    auto = getattr(transformers, f"AutoModelFor{head}")
    return auto.from_config(config).eval()


@pytest.fixture
def ids():
    return torch.randint(5, 120, (4, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def bert(tmp_path):
    """A small BERT classifier folder, with a file beside the weights."""
    family_model("bert").save_pretrained(tmp_path / "source")
    (tmp_path / "source/vocab.txt").write_text("[PAD]\n")
    return tmp_path / "source"


@pytest.fixture(scope="session")
def sharded(tmp_path_factory):
    """An encoder of 20 MB in 5 files, and the options that quantize it into about a dozen."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(4)
    sizes = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 64}
    config = transformers.BertConfig(num_hidden_layers=6, num_attention_heads=4, **sizes)
    transformers.BertModel(config).save_pretrained(folder, max_shard_size="5MB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder, {"bits": 4, "shard_bytes": 250_000}
