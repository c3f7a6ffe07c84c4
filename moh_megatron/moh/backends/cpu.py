"""Computes attention of the active queries by a C++ kernel, in fp32 and on one thread.

The kernel is compiled on first use and cached. It is built in a temporary folder and renamed into the cache when it is
complete: ranks that build at the same time do not wait for one another, and a killed build leaves no lock behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from moh_megatron.moh.backends.ragged_function import KernelInputs
from moh_megatron.moh.precision import at_least_fp32

_SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
_FLAGS = ("-O3", "-std=c++17", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
_VECTOR_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}


def _cache_folder() -> Path:
    """The folder of our kernels in torch's cache of extensions (TORCH_EXTENSIONS_DIR, else the user's cache)."""
    from torch.utils import cpp_extension

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()) / "moh_megatron"


@contextlib.contextmanager
def _environment_first_on_path() -> Iterator[None]:
    # torch looks for ninja on the PATH, which lacks the folder of an environment that was not activated.
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
    try:
        yield
    finally:
        os.environ["PATH"] = path


def _build(flags: tuple[str, ...], target: Path) -> None:
    from torch.utils import cpp_extension  # imported here because it is slow and rarely needed

    target.parent.mkdir(parents=True, exist_ok=True)
    with _environment_first_on_path(), tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        cpp_extension.load(
            name=target.stem,
            sources=[str(_SOURCE)],
            extra_cflags=list(flags),
            build_directory=folder,
            is_python_module=False,
        )
        os.replace(Path(folder) / f"{target.stem}.so", target)


def _with_signatures(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.moh_ragged_forward.argtypes = [pointer] * 5 + [integer] * 2 + [pointer] * 2
    library.moh_ragged_backward.argtypes = [pointer] * 8 + [integer] * 2 + [pointer] * 3
    library.moh_ragged_forward.restype = library.moh_ragged_backward.restype = None
    return library


@functools.cache
def kernel_library() -> ctypes.CDLL | None:
    """The kernel, compiled if the cache lacks it; None, after one warning, where it cannot be compiled."""
    flags = _FLAGS + _VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ())
    # Machines with other CPUs or other versions of torch may share the cache.
    identity = "\n".join([*flags, torch.__version__, _SOURCE.read_text(encoding="utf-8")])
    target = _cache_folder() / f"ragged_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    try:
        if not target.exists():
            _build(flags, target)
        return _with_signatures(ctypes.CDLL(str(target)))
    except (OSError, RuntimeError, AttributeError) as error:
        warnings.warn(
            f"The C++ attention kernel cannot be built ({_reason(error)}); using the PyTorch one.", stacklevel=2
        )
        return None


def _reason(error: Exception) -> str:
    """One line of a build's output: the first that mentions an error, else the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    errors = [line for line in lines[1:] if "not found" in line or "error" in line.lower()]
    return (errors or lines[-1:])[0]


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel supports tensors of this type and device; it computes in fp32."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)


def available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel ``serves`` such tensors and can be compiled."""
    return serves(dtype, device) and kernel_library() is not None


class CpuKernel:
    """The C++ kernel as a ``ragged_function.Kernel``; it must be ``available``."""

    precision = staticmethod(at_least_fp32)

    def __init__(self) -> None:
        library = kernel_library()
        assert library is not None
        self._library = library

    def forward(self, lists: KernelInputs) -> tuple[Tensor, Tensor]:
        q, ragged = lists.q * lists.scale, lists.ragged
        out, log_sums = torch.empty_like(q), q.new_empty(q.shape[0])
        for index, (key, value) in enumerate(zip(lists.k, lists.v, strict=True)):
            span = slice(ragged.bounds[index], ragged.bounds[index + 1])
            self._library.moh_ragged_forward(
                *_pointers(q[span], key, value, ragged.first_key[span], ragged.last_key[span]),
                span.stop - span.start,
                q.shape[1],
                *_pointers(out[span], log_sums[span]),
            )
        return out, log_sums

    def backward(self, lists: KernelInputs, d_out: Tensor, out: Tensor, saved: Tensor | None) -> tuple[Tensor, ...]:
        assert saved is not None
        q, ragged, delta = lists.q * lists.scale, lists.ragged, (d_out * out).sum(-1)
        d_q, d_k, d_v = (torch.zeros_like(x) for x in (q, lists.k, lists.v))
        for index, (key, value) in enumerate(zip(lists.k, lists.v, strict=True)):
            span = slice(ragged.bounds[index], ragged.bounds[index + 1])
            self._library.moh_ragged_backward(
                *_pointers(d_out[span], q[span], key, value, ragged.first_key[span], ragged.last_key[span]),
                *_pointers(saved[span], delta[span]),
                span.stop - span.start,
                q.shape[1],
                *_pointers(d_q[span], d_k[index], d_v[index]),
            )
        return d_q.mul_(lists.scale), d_k, d_v


def _pointers(*tensors: Tensor) -> list[int]:
    assert all(tensor.is_contiguous() for tensor in tensors)
    return [tensor.data_ptr() for tensor in tensors]
