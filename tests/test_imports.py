"""What importing the package puts in the way of others' imports: followed once, taken away, and in nobody's way."""

CODE = """
import importlib, importlib.abc, json, sys
import kmq_kernels, kmq_kernels.imports

class Old:  # a finder of the old kind, which Python asks until 3.11 and passes over then
    def find_module(self, name, path=None):
        return None

class Asks(importlib.abc.MetaPathFinder):  # asks all other finders, as ours does
    asking = False

    def find_spec(self, name, path, target=None):
        if self.asking:
            return None
        self.asking = True
        try:
            specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if hasattr(finder, "find_spec"))
            return next((spec for spec in specs if spec is not None), None)
        finally:
            self.asking = False

sys.meta_path[:0] = [Old(), Asks()]
before = {name for name in sys.modules if name.startswith(("torch.", "transformers."))}
importlib.reload(kmq_kernels)
followers = [finder for finder in sys.meta_path if type(finder).__name__ == "_Follower"]
import transformers.quantizers.auto as auto
print(json.dumps({
    "heavy before": sorted(before)[:3],
    "followers": len(followers),
    "left": [finder._other for finder in sys.meta_path if type(finder).__name__ == "_Follower"],
    "registered": auto.AUTO_QUANTIZER_MAPPING["kmq"].__name__,
    "loader": type(auto.__spec__.loader).__name__,
    "ops": hasattr(sys.modules["torch"].ops.kmq, "codebook_linear"),
}))
"""


def test_the_import_hook(run_python):
    found = run_python(CODE)
    assert found["heavy before"] == []
    assert found["followers"] == 3  # torch's, that of the registry and PEFT's, once each after the reload
    assert all(name.startswith("peft") for name in found["left"])  # which was not imported
    assert found["registered"] == "KMQQuantizer"
    assert found["loader"] == "SourceFileLoader"
    assert found["ops"]
