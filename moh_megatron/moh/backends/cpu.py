"""Only the active queries, by a C++ kernel: fp32, one thread. Built on first use, kept for the next.

The library is built in a folder of its own and renamed into the cache when it is complete: several ranks that build at
once do not wait for one another, and a build that was killed leaves nothing anyone waits for.
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

from moh_megatron.moh.backends.ragged_function import Lists
from moh_megatron.moh.precision import at_least_fp32

_SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
_FLAGS = ("-O3", "-std=c++17", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
_VECTOR_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}


def _cache_folder() -> Path:
    """Where torch keeps extensions it built (TORCH_EXTENSIONS_DIR, else the user's cache)."""
    from torch.utils import cpp_extension

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()) / "moh_megatron"


@contextlib.contextmanager
def _own_programs_first() -> Iterator[None]:
    # torch looks for ninja on the PATH, where an environment that was not activated is missing.
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
    try:
        yield
    finally:
        os.environ["PATH"] = path


def _build(flags: tuple[str, ...], target: Path) -> None:
    from torch.utils import cpp_extension  # slow to import, and rarely needed

    target.parent.mkdir(parents=True, exist_ok=True)
    with _own_programs_first(), tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        cpp_extension.load(
            name=target.stem,
            sources=[str(_SOURCE)],
            extra_cflags=list(flags),
            build_directory=folder,
            is_python_module=False,
        )
        os.replace(Path(folder) / f"{target.stem}.so", target)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.moh_ragged_forward.argtypes = [pointer] * 5 + [integer] * 2 + [pointer] * 2
    library.moh_ragged_backward.argtypes = [pointer] * 8 + [integer] * 2 + [pointer] * 3
    library.moh_ragged_forward.restype = library.moh_ragged_backward.restype = None
    return library


@functools.cache
def kernel_library() -> ctypes.CDLL | None:
    """The kernel, built if need be; None, after one warning, where it cannot be built (no compiler, no BLAS)."""
    flags = _FLAGS + _VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ())
    # A cache may be shared by machines of other kinds and other versions of torch.
    identity = "\n".join([*flags, torch.__version__, _SOURCE.read_text(encoding="utf-8")])
    target = _cache_folder() / f"ragged_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    try:
        if not target.exists():
            _build(flags, target)
        return _declared(ctypes.CDLL(str(target)))
    except (OSError, RuntimeError, AttributeError) as error:
        warnings.warn(
            f"The C++ attention kernel cannot be built ({_reason(error)}); using the PyTorch one.", stacklevel=2
        )
        return None


def _reason(error: Exception) -> str:
    """The telling line of what a build printed: the first that speaks of an error, else the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    telling = [line for line in lines[1:] if "not found" in line or "error" in line.lower()]
    return (telling or lines[-1:])[0]


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel is made for such tensors: on the CPU, computed in fp32."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)


def available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel ``serves`` such tensors, and can be built."""
    return serves(dtype, device) and kernel_library() is not None


class CpuKernel:
    """The C++ kernel, which must be ``available``; see ``ragged_function.Kernel``."""

    precision = staticmethod(at_least_fp32)

    def __init__(self) -> None:
        library = kernel_library()
        assert library is not None
        self._library = library

    def forward(self, lists: Lists) -> tuple[Tensor, Tensor]:
        q, ragged = lists.q * lists.scale, lists.ragged
        rows, log_sums = torch.empty_like(q), q.new_empty(q.shape[0])
        for index, (key, value) in enumerate(zip(lists.k, lists.v, strict=True)):
            part = slice(ragged.bounds[index], ragged.bounds[index + 1])
            self._library.moh_ragged_forward(
                *_pointers(q[part], key, value, ragged.first_key[part], ragged.last_key[part]),
                part.stop - part.start,
                q.shape[1],
                *_pointers(rows[part], log_sums[part]),
            )
        return rows, log_sums

    def backward(self, lists: Lists, d_rows: Tensor, rows: Tensor, extra: Tensor | None) -> tuple[Tensor, ...]:
        assert extra is not None
        q, ragged, delta = lists.q * lists.scale, lists.ragged, (d_rows * rows).sum(-1)
        d_q, d_k, d_v = (torch.zeros_like(x) for x in (q, lists.k, lists.v))
        for index, (key, value) in enumerate(zip(lists.k, lists.v, strict=True)):
            part = slice(ragged.bounds[index], ragged.bounds[index + 1])
            self._library.moh_ragged_backward(
                *_pointers(d_rows[part], q[part], key, value, ragged.first_key[part], ragged.last_key[part]),
                *_pointers(extra[part], delta[part]),
                part.stop - part.start,
                q.shape[1],
                *_pointers(d_q[part], d_k[index], d_v[index]),
            )
        return d_q.mul_(lists.scale), d_k, d_v


def _pointers(*tensors: Tensor) -> list[int]:
    assert all(tensor.is_contiguous() for tensor in tensors)
    return [tensor.data_ptr() for tensor in tensors]
