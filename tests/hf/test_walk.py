"""Every family that transformers builds from a small configuration: quantized, saved, read in a fresh process, bit for bit.

The list of families in the default run is short and named; the walk over all of them is slow.
"""

import hashlib
import json
import shutil

import pytest
import torch
import transformers
from checkpoints import quantize
from small_models import build, kinds

import kmq_kernels as kmq
from kmq_kernels.checkpoint import verify_checkpoint

NAMED = [
    ("bert", "AutoModelForMaskedLM"),
    ("distilbert", "AutoModelForSequenceClassification"),
    ("deberta-v2", "AutoModelForMaskedLM"),
    ("modernbert", "AutoModelForMaskedLM"),
    ("nomic_bert", "AutoModel"),  # saves the names of the original checkpoint, and joins its projections
    ("jina_embeddings_v3", "AutoModel"),
    ("gte", "AutoModelForMaskedLM"),
    ("xlm-roberta", "AutoModel"),
    ("t5", "AutoModelForSequenceClassification"),  # tied inside
    ("clip", "AutoModel"),  # two models in one
    ("gpt2", "AutoModel"),
    ("falcon_mamba", "AutoModel"),  # its forward asks whether it is quantized
]
HEADS = ["AutoModelForMaskedLM", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"]

# Families that are refused, and the sentence. Convolutions are all that these have; I-BERT has layers of its own only.
REFUSED = "ValueError: model: it has no embedding or linear layer to quantize"
WITHOUT_LAYERS = ["mobilenet_v2", "poolformer", "pp_ocrv6_small_det", "pp_ocrv6_small_rec", "pp_ocrv6_tiny_rec", "ibert"]
# `kmq quantize` alone: of these transformers joins tensors, mostly experts, while it loads what save_pretrained wrote.
REFUSED_AS_STREAM = "; save the model again with save_pretrained(save_original_format=False) first"
JOINED = [
    "afmoe", "axk1", "axk2", "bailing_hybrid", "cohere2_moe", "deepseek_v2", "deepseek_v4", "dots3_note_text", "ernie4_5_moe",
    "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm5_next", "glm5_next_text", "gradium_phonon_tts",
    "hy_v3", "inkling2", "inkling2_text", "jamba", "kimi_k25", "kimi_linear", "laguna", "longcat_flash", "mellum",
    "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl", "mistral_large4", "mistral_large4_text", "mixtral",
    "molmo2_text", "nemo_speechlm", "nemotron_h", "olmo_hybrid", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe",
    "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_omni_moe_thinker", "qwen3_vl_moe", "solar_open", "step3p7",
]  # fmt: skip

READ = """
import json, sys
sys.path.insert(0, {tests!r})
import torch, transformers
import kmq_kernels
from test_walk import digest
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
found = {{}}
for name, (auto, folder) in json.loads({work!r}).items():
    try:
        found[name] = digest(getattr(transformers, auto).from_pretrained(folder))
    except Exception as error:
        found[name] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(found))
"""


def digest(model):
    """SHA-256 of everything a model holds, and of what it makes of a few token ids where it takes nothing else."""
    content = hashlib.sha256()
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)  # torch's results depend on place and strides
    for name, tensor in sorted(model.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    try:
        torch.manual_seed(0)
        with torch.no_grad():
            out = model(input_ids=torch.tensor([[7, 8, 9, 10, 11, 12, 13, 6]]))[0]
        content.update(out.float().contiguous().numpy().tobytes())
    except Exception:  # another kind of input: then the tensors are compared alone
        content.update(b"no output")
    return content.hexdigest()


def walk(work, folder, run_python):
    """{name: what is wrong} for (kind, auto class) pairs; each is quantized in memory and as a stream."""
    wrong, expected, todo = {}, {}, {}
    for kind, auto in work:
        name = f"{kind} {auto}"
        model = build(kind, auto)
        if model is None:
            wrong[name] = "not built"
            continue
        model.save_pretrained(folder / name / "dense")
        try:
            kmq.quantize_(model, kmq.KMQConfig(bits=3))
            model.save_pretrained(folder / name / "packed")
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
            shutil.rmtree(folder / name)
            continue
        expected[name] = digest(model)
        todo[name] = (auto, str(folder / name / "packed"))
        try:
            quantize(folder / name / "dense", folder / name / "stream", bits=3, model_class=type(model).__name__)
            verify_checkpoint(folder / name / "stream")
            expected[f"{name} stream"] = expected[name]
            todo[f"{name} stream"] = (auto, str(folder / name / "stream"))
        except Exception as error:
            wrong[f"{name} stream"] = f"{type(error).__name__}: {error}"
        shutil.rmtree(folder / name / "dense")
    from pathlib import Path

    found = run_python(READ.format(tests=str(Path(__file__).parent), work=json.dumps(todo)))
    return wrong | {name: found[name] for name in todo if found[name] != expected[name]}


def test_named_families(tmp_path, run_python):
    assert walk(NAMED, tmp_path, run_python) == {}


def unexpected(wrong):
    """What is wrong and no refusal of the lists."""
    left = {}
    for name, sentence in wrong.items():
        kind, stream = name.split()[0], name.endswith("stream")
        without = kind in WITHOUT_LAYERS and sentence.startswith(REFUSED)
        joined = stream and kind in JOINED and "transformers joins or splits" in sentence and sentence.endswith(REFUSED_AS_STREAM)
        if not (without or joined):
            left[name] = sentence
    return left


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_every_family(part, tmp_path, run_python):
    work = [(kind, "AutoModel") for kind in kinds()[part::8] if build(kind, "AutoModel") is not None]
    assert unexpected(walk(work, tmp_path, run_python)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_every_family_with_a_head(head, tmp_path, run_python):
    mapping = getattr(transformers, head)._model_mapping
    known = {config.model_type for config in mapping}
    work = [(kind, head) for kind in kinds() if kind in known and build(kind, head) is not None]
    assert len(work) > 0.9 * len(known)
    assert unexpected(walk(work, tmp_path, run_python)) == {}
