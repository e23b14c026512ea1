"""A GPU that is not there, for machines without one: what would run on it, run through without numbers or memory.

`fake_gpu.cpp` lets a CPU build of torch know the device "cuda"; under FakeTensorMode our step and DeepSpeed's then run
on tensors that have a shape, a dtype and a device, and nothing else. A value that the host would read is an error
there, or counted. What is counted is what torch would launch: one kernel for each ATen operation that is no view.
Streams, times, and what a kernel computes cannot be seen so.

Import this before torch, with CTCD_FAKE_GPU naming the library that `build`, or this file as a script, has made. The
process must end by `os._exit`, since what it registers is not made to be taken down.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LIBRARY = "CTCD_FAKE_GPU"
if LIBRARY in os.environ:
    os.environ["DS_ACCELERATOR"] = "cuda"
    ctypes.CDLL(os.environ[LIBRARY], mode=ctypes.RTLD_GLOBAL)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

CUDA = torch.device("cuda", 0)


def build(folder: Path) -> Path:
    """The library for this torch, compiled by g++ (6 s)."""
    from torch.utils.cpp_extension import include_paths, library_paths

    library, source = folder / "fake_gpu.so", Path(__file__).with_suffix(".cpp")
    line = ["g++", "-std=c++20", "-shared", "-fPIC", *(f"-I{path}" for path in include_paths()), source, "-o", library]
    line += [word for path in library_paths() for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
    subprocess.run([*line, "-lc10", "-ltorch_cpu"], check=True, capture_output=True, text=True)
    return library


def move(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Puts a module's weights on the GPU, in place, tied ones tied; inside FakeTensorMode."""
    moved: dict[int, tuple[Any, Any]] = {}  # with the old ones, whose ids must stay theirs
    for part in module.modules():
        for name, old in [*part._parameters.items(), *part._buffers.items()]:
            if old is None:
                continue
            if id(old) not in moved:
                new = torch.empty(old.shape, dtype=dtype if old.is_floating_point() else old.dtype, device=CUDA)
                is_weight = isinstance(old, torch.nn.Parameter)
                moved[id(old)] = (torch.nn.Parameter(new, old.requires_grad) if is_weight else new, old)
            (part._parameters if name in part._parameters else part._buffers)[name] = moved[id(old)][0]


@dataclass
class Kernel:
    """One operation on the GPU: bytes that its arguments and results have, floating point operations of its GEMMs."""

    name: str
    phase: str
    bytes: int
    flops: int
    tiles: int  # of 128 × 256 in a GEMM's result: where they are few, the GPU's parts share the sums

    @property
    def seconds(self) -> float:
        """What it would take on an H100, by rates that are assumed and not measured: the slowest of three limits."""
        rate = 120e12 if "attention" in self.name else 620e12 if self.tiles >= 60 else 450e12
        return max(self.bytes / 2.9e12, self.flops / rate, 2.2e-6)


_VIEWS = {"detach", "alias", "lift_fresh", "is_same_size", "empty", "empty_like", "empty_strided", "new_empty"}
_VIEWS |= {"new_empty_strided", "_unsafe_view", "reshape"}
_FILLS = {"zeros_like", "new_zeros", "ones_like", "full_like", "new_full", "zero", "fill"}  # read nothing
_SPARSE = {"embedding", "gather", "index", "index_select", "scatter_add", "index_put", "embedding_dense_backward"}


class Count(TorchDispatchMode):
    """What runs inside: `kernels`, each with the `phase` of its moment; `waits`: copies that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.kernels: list[Kernel] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = operation(*arguments, **(named or {}))
        name = operation._schema.name.split("::")[1]
        before, after = _tensors((arguments, named)), _tensors(result)
        if name in ("_to_copy", "copy_") and any(t.is_cuda for t in after):
            self.waits += [name for tensor in before if not tensor.is_cuda and not tensor.is_pinned()]
        written = after or (
            _tensors(arguments[0]) if name.startswith(("_foreach", "_fused")) else []
        )  # a list, in place
        if name not in _VIEWS and not operation.is_view and any(tensor.is_cuda for tensor in written):
            moved = sum(t.numel() * t.element_size() for t in _moved(name, arguments, before, after))
            self.kernels.append(Kernel(name, self.phase, moved, *_product(name, arguments)))
        return result


def _tensors(tree: Any) -> list[Any]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _moved(name: str, arguments: Any, before: list[Any], after: list[Any]) -> list[Any]:
    """What an operation reads and writes."""
    plain = name.rstrip("_")
    if plain in _FILLS:
        return after
    if plain == "copy":
        return before
    if plain == "_fused_adamw":  # weights and moments are written
        return before + _tensors(arguments[0]) + _tensors(arguments[2:4])
    if plain.startswith("_foreach") and not after:
        return before + _tensors(arguments[0])
    everything = before + after
    if plain in _SPARSE:  # of its largest tensor it touches what the others name
        largest = max(everything, key=torch.Tensor.numel)
        return [tensor for tensor in everything if tensor is not largest]
    return everything


def _product(name: str, arguments: Any) -> tuple[int, int]:
    """FLOPs and tiles of a GEMM or of attention; (0, 0) of anything else."""
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        a, b = arguments[1:3] if "add" in name else arguments[:2]
        return 2 * a.numel() * b.shape[-1], a.numel() // a.shape[-1] * b.shape[-1] // (128 * 256)
    if "scaled_dot_product" in name:
        rows, heads, length, width = arguments["backward" in name].shape
        return int(rows * heads * length**2 * width * (10 if "backward" in name else 4)), 0
    return 0, 0


_attention = torch.nn.functional.scaled_dot_product_attention


def flash_attention(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, **named: Any) -> Any:
    """In place of F.scaled_dot_product_attention, which would ask a GPU what it can: what an H100 takes for no mask."""
    if not q.is_cuda or attn_mask is not None:
        return _attention(q, k, v, attn_mask, dropout_p, **named)
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(q, k, v, dropout_p, named.get("is_causal", False), False, scale=named.get("scale"))[0]


class _Stream:
    """Streams and events order work on a device that does none."""

    cuda_stream = device_index = stream_id = 0
    device, device_type = CUDA, 1

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class Runtime:
    """torch.cuda and a process group of `world` ranks as DeepSpeed asks for them, this process being rank 0.

    `waits`: where the host waited for the device or read a value; what it reads is 1. `collectives`: (name, elements,
    dtype) of what went to the other ranks, whose share is whatever is in the tensor already.
    """

    def __init__(self, world: int) -> None:
        self.waits: list[str] = []
        self.collectives: list[tuple[str, int, str]] = []
        self._torch_cuda()
        self._reads()
        self._process_group(world)

    def _torch_cuda(self) -> None:
        cuda: Any = torch.cuda
        cuda.is_available = cuda.is_initialized = cuda.is_bf16_supported = lambda *_, **__: True
        cuda.device_count, cuda.current_device = (lambda: 1), (lambda: 0)
        cuda.get_device_name, cuda.get_device_capability = (lambda *_: "NVIDIA H100 80GB HBM3"), (lambda *_: (9, 0))
        cuda.get_device_properties = lambda *_: SimpleNamespace(total_memory=80 * 2**30, multi_processor_count=132)
        cuda.mem_get_info = lambda *_: (70 * 2**30, 80 * 2**30)
        cuda.memory_allocated = cuda.max_memory_allocated = cuda.memory_reserved = lambda *_: 0
        cuda.max_memory_reserved = cuda.memory_cached = cuda.max_memory_cached = lambda *_: 0
        cuda.Stream = cuda.Event = _Stream
        cuda.current_stream = cuda.default_stream = lambda *_: _Stream()
        cuda.stream = lambda *_: nullcontext()
        cuda.synchronize = lambda *_: self.waits.append("torch.cuda.synchronize")
        for name in ("set_device", "init", "_lazy_init", "empty_cache", "reset_peak_memory_stats", "manual_seed_all"):
            setattr(cuda, name, lambda *_: None)
        for name in ("range_push", "range_pop", "mark"):
            setattr(torch.cuda.nvtx, name, lambda *_: 0)

    def _reads(self) -> None:
        def read(name: str) -> Any:
            plain = getattr(torch.Tensor, name)

            def reading(tensor: torch.Tensor, *arguments: Any) -> Any:
                if not tensor.is_cuda:
                    return plain(tensor, *arguments)
                self.waits.append(name)
                return np.ones(tuple(tensor.shape)).tolist()

            return reading

        for owner in (torch.Tensor, FakeTensor):
            owner.tolist, owner.item = read("tolist"), read("item")  # type: ignore[method-assign, assignment]
        torch.Tensor.data_ptr = lambda _: 0  # type: ignore[method-assign]
        torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]

    def _process_group(self, world: int) -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world))
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        for name in ("all_reduce", "all_gather_into_tensor", "all_gather", "broadcast", "reduce"):
            setattr(dist, name, self._collective(name))
        dist.barrier = lambda *_, **__: None

    def _collective(self, name: str) -> Any:
        def collective(*arguments: Any, **named: Any) -> None:
            (tensor, *_) = tree_leaves((arguments, named))
            self.collectives.append((name, tensor.numel(), str(tensor.dtype)))

        return collective


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
