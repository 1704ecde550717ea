"""A CUDA device that is not here, for as long as a block lasts: what would be launched on it is compiled or counted, never run.

`pretended` gives PyTorch tensors of a device "cuda" with shape and dtype and no contents, and Triton a driver whose target is
the architecture asked for. The package's own launchers then choose tiles, pieces and flags as they do on the device, and Triton
makes the same cache keys from the launches. Whatever asks for contents gets zeros, and comparisons agree: checks of results pass.
"""

import contextlib
import ctypes
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True)
class Chip:
    """What the launchers ask of a device; a launch depends on the number of multiprocessors by the pieces of a reduction."""

    name: str
    multiprocessors: int
    l2_bytes: int


# By architecture, the device with the most sales: what is compiled for it fits others of its kind but for a few pieces.
CHIPS = {
    80: Chip("A100", 108, 40 << 20),
    89: Chip("L40S", 142, 96 << 20),
    90: Chip("H100 or H200", 132, 50 << 20),
    100: Chip("B200", 148, 126 << 20),
    120: Chip("RTX 5090", 170, 96 << 20),
}


class _Pretended(Tensor):
    """A tensor of the device: `meta` has its shape and dtype."""

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor) -> "_Pretended":
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, meta.shape, meta.stride(), meta.storage_offset(), dtype=meta.dtype, device=DEVICE
        )

    def __init__(self, meta: Tensor) -> None:
        self.meta = meta

    def data_ptr(self) -> int:
        """Allocations of the device begin at multiples of 512 bytes."""
        return (1 << 40) + self.meta.storage_offset() * self.meta.element_size()

    def __getitem__(self, place: Any) -> "_Pretended":  # PyTorch's own wants a guard of the device, which it may not have
        return _Pretended(self.meta[tree_map_only(Tensor, _meta, place)])

    def __setitem__(self, place: Any, value: Any) -> None:
        self.meta[tree_map_only(Tensor, _meta, place)] = _meta(value) if isinstance(value, Tensor) else value

    def copy_(self, source: Tensor, non_blocking: bool = False) -> "_Pretended":
        return self

    def item(self) -> Any:
        return False if self.dtype == torch.bool else 0.0 if self.dtype.is_floating_point else 0

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def tolist(self) -> Any:
        return torch.zeros(self.shape, dtype=self.dtype).tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"pretended {tuple(self.shape)} {self.dtype}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _Pretending():
            return func(*args, **(kwargs or {}))


class _Pretending(TorchDispatchMode):
    """Computes shapes only where an argument or the result is of the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found: list[_Pretended] = []
        tree_map_only(_Pretended, found.append, (args, kwargs))
        if func.namespace == "kmq" and found:  # as the dispatcher does on the device
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)
        targets: list[torch.device] = []
        tree_map_only(torch.device, targets.append, (args, kwargs))
        to_host = bool(found) and any(target.type == "cpu" for target in targets)
        if not found and not any(target.type == "cuda" for target in targets):
            return func(*args, **kwargs)
        name = func.name()
        if name == "aten::_local_scalar_dense":
            return found[0].item()
        if name == "aten::equal":
            return args[0].shape == args[1].shape
        if name == "aten::bincount":
            least = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
            return _Pretended(torch.empty(least, dtype=torch.int64, device="meta"))
        args, kwargs = tree_map_only(torch.device, lambda _: torch.device("meta"), (args, kwargs))
        args, kwargs = tree_map_only(Tensor, _meta, (args, kwargs))
        out = func(*args, **kwargs)
        if to_host or (name == "aten::copy_" and not isinstance(found[0], _Pretended)):
            return tree_map_only(Tensor, lambda meta: torch.zeros(meta.shape, dtype=meta.dtype), out)
        known = {id(tensor.meta): tensor for tensor in found}
        return tree_map_only(Tensor, lambda meta: known[id(meta)] if id(meta) in known else _Pretended(meta), out)


def _meta(tensor: Tensor) -> Tensor:
    return tensor.meta if isinstance(tensor, _Pretended) else tensor.detach().to("meta")


class _Driver:
    """Triton's driver of the device. `kernels` launched so far; with `launchers`, what a launch needs in C is built as well."""

    def __init__(self, architecture: int, launchers: bool) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)
        self.launched = 0
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (None, None, 0, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": (99 if architecture in (86, 89, 120) else 227) << 10},
        )
        self.launchers = launchers

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return DEVICE

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        from triton.backends.nvidia import driver

        if self.launchers and hasattr(driver, "make_launcher"):  # up to 3.6 each signature has a launcher of its own, in C
            constants = {(source.fn.arg_names.index(k),) if isinstance(k, str) else k: v for k, v in source.constants.items()}
            text = driver.make_launcher(constants, dict(source.signature), getattr(metadata, "tensordesc_meta", None))
            build_module(text, "__triton_launcher")

        def launch(*_: Any) -> None:
            self.launched += 1

        return launch


_STUBS: list[ctypes.CDLL] = []


def build_module(text: str, name: str) -> None:
    """Puts a C module of Triton's driver into its cache, built without a driver of NVIDIA."""
    from triton.backends.nvidia import driver
    from triton.runtime.build import compile_module_from_src

    compile_module_from_src(src=text, name=name, include_dirs=driver.include_dirs, libraries=["libcuda.so.1"])


def _build(
    name: str, source: str, folder: str, library_dirs: list[str], include_dirs: list[str], libraries: list[str], *flags: Any
) -> str:
    """Triton's build, with an empty library in the place of libcuda.so.1; that library is loaded, since the module is next."""
    out = Path(folder) / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = [f"-I{path}" for path in [*include_dirs, folder, sysconfig.get_paths(scheme="posix_prefix")["include"]]]
    common = ["gcc", "-shared", "-fPIC", "-O3", "-w"]
    subprocess.run([*common, source, "-o", str(out), *include], check=True)
    wanted = subprocess.run(["nm", "-D", "--undefined-only", str(out)], capture_output=True, text=True, check=True).stdout
    stub = Path(tempfile.mkdtemp(dir=folder)) / "libcuda.so.1"
    names = re.findall(r"\bU (cu[A-Z]\w+)", wanted)
    (stub.parent / "stub.c").write_text("".join(f"int {one}(void) {{ return 999; }}\n" for one in names))
    soname = ["-Wl,-soname,libcuda.so.1"]
    subprocess.run([*common, str(stub.parent / "stub.c"), "-o", str(stub), *soname], check=True)
    subprocess.run([*common, source, "-o", str(out), *include, f"-L{stub.parent}", "-l:libcuda.so.1"], check=True)
    _STUBS.append(ctypes.CDLL(str(stub), mode=ctypes.RTLD_GLOBAL))
    return str(out)


def _no_module(name: str, path: str) -> None:
    """A built module is kept for the device and not loaded here."""


@contextlib.contextmanager
def pretended(architecture: int, launchers: bool = False) -> Iterator[_Driver]:
    """A device of this architecture for PyTorch and Triton, in this process, until the block ends; not under the interpreter."""
    import triton
    from triton.runtime import build
    from triton.runtime.driver import driver

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter compiles nothing")
    chip, made = CHIPS[architecture], _Driver(architecture, launchers)
    properties = SimpleNamespace(multi_processor_count=chip.multiprocessors, L2_cache_size=chip.l2_bytes, name=chip.name)
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == divmod(architecture, 10):
        properties = torch.cuda.get_device_properties(0)  # the device itself: its launches are what is wanted
    none = contextlib.nullcontext()
    answers = {
        "_lazy_init": None, "is_available": True, "device": none, "current_device": 0, "get_device_properties": properties,
        "get_device_capability": divmod(architecture, 10), "get_device_name": chip.name, "mem_get_info": (80 << 30, 80 << 30),
        "empty_cache": None, "synchronize": None,
    }  # fmt: skip
    patches = [
        *(mock.patch.object(torch.cuda, name, return_value=answer) for name, answer in answers.items()),
        mock.patch.object(triton.knobs.build, "impl", _build),
        mock.patch.object(build, "_load_module_from_path", _no_module),
    ]
    before, lifted = driver._active, torch._C._only_lift_cpu_tensors()
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(_Pretending())
        driver.set_active(made)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made here, and then sent to the device
        try:
            yield made
        finally:
            torch._C._set_only_lift_cpu_tensors(lifted)
            driver._active = before
