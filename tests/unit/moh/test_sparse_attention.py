"""Every backend against masked dense attention, in values and gradients; argument checks and builds."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moh_megatron.moh import sparse_attention
from moh_megatron.moh.backends import choice, cpu
from moh_megatron.moh.packed_documents import attend_packed

SPARSE = ["gathered", "cpu"]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


def reference(q: Tensor, k: Tensor, v: Tensor, active: Tensor, starts: Tensor) -> Tensor:
    """Attention step by step: scores, causal mask, softmax, mask of heads."""
    width = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(width, 2) for x in (k, v))
    scores = torch.einsum("ibnh,jbnh->bnij", q, k) * q.shape[-1] ** -0.5
    position = torch.arange(q.shape[0])
    seen = (position <= position[:, None]) & (position >= starts[:, None])
    out = torch.einsum("bnij,jbnh->ibnh", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
    return out * active.unsqueeze(-1)


def compare(backend: str, q: Tensor, k: Tensor, v: Tensor, active: Tensor, documents: list[int] | None = None) -> None:
    """Assert that output and gradients equal the reference to rounding."""
    length = q.shape[0]
    ends = documents or [0, length]
    starts = torch.tensor([s for s, e in itertools.pairwise(ends) for _ in range(e - s)])
    cu_seqlens = torch.tensor(documents, dtype=torch.int32) if documents else None
    leaves = (q.clone().requires_grad_(), k.clone().requires_grad_(), v.clone().requires_grad_())
    probe = torch.randn(q.shape, generator=torch.Generator().manual_seed(9), dtype=q.dtype)
    expected = reference(*leaves, active, starts)
    expected_gradients = torch.autograd.grad(expected, leaves, probe)
    got = sparse_attention(*leaves, active, cu_seqlens=cu_seqlens, backend=backend)  # type: ignore[arg-type]
    gradients = torch.autograd.grad(got, leaves, probe)
    assert not got[~active].any()
    for name, a, b in zip(["out", "q", "k", "v"], (got, *gradients), (expected, *expected_gradients), strict=True):
        # A gradient may be zero (tokens that see only themselves); the scale of the inputs, 1, is used then.
        largest = float(b.abs().max())
        scale = largest if largest > 1e-3 else 1.0
        assert float((a - b).abs().max()) <= TOLERANCE[q.dtype] * scale, name


def draw(
    length: int, batch: int, groups: int, width: int, size: int, share: float, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = groups * width
    q, k, v = (torch.randn(length, batch, n, size, generator=generator, dtype=dtype) for n in (heads, groups, groups))
    active = torch.rand(length, batch, heads, generator=generator) < share
    return q, k, v, active


@settings(max_examples=40)
@given(
    backend=st.sampled_from(SPARSE),
    length=st.sampled_from([1, 2, 17, 64, 65, 130, 300]),
    batch=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 3]),
    width=st.sampled_from([1, 2, 3]),
    size=st.sampled_from([8, 12, 64]),
    share=st.sampled_from([0.0, 0.02, 0.5, 0.75, 1.0]),
    seed=st.integers(0, 99),
)
def test_backend_equals_reference_for_any_shape_and_share(backend: str, seed: int, **shape: Any) -> None:
    compare(backend, *draw(**shape, seed=seed, dtype=torch.float32))


@settings(max_examples=30)
@given(
    backend=st.sampled_from(["dense", *SPARSE]),
    cuts=st.lists(st.integers(0, 150), max_size=5),
    share=st.sampled_from([0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_backend_equals_reference_for_packed_documents(backend: str, cuts: list[int], share: float, seed: int) -> None:
    compare(backend, *draw(150, 1, 2, 2, 16, share, seed, torch.float32), documents=[0, *sorted(cuts), 150])


@pytest.mark.parametrize("backend", ["dense", "gathered"])
def test_backend_equals_reference_in_float64(backend: str) -> None:
    compare(backend, *draw(200, 2, 3, 3, 16, 0.5, 1, torch.float64))
    compare(backend, *draw(200, 1, 3, 3, 16, 0.5, 1, torch.float64), documents=[0, 3, 90, 200])


@pytest.mark.parametrize("backend", SPARSE)
def test_backend_equals_reference_for_skewed_routing_and_unused_heads(backend: str) -> None:
    q, k, v, active = draw(300, 2, 2, 3, 16, 0.5, 2, torch.float32)
    active[..., 0], active[..., 1], active[:250, :, 2], active[1:, :, 5] = True, False, False, False
    active[:, 1, 3:] = False
    compare(backend, q, k, v, active)


@pytest.mark.parametrize("backend", SPARSE)
def test_backend_equals_reference_for_large_scores(backend: str) -> None:
    q, k, v, active = draw(300, 1, 1, 2, 16, 0.5, 3, torch.float32)
    compare(backend, q * 30, k, v, active)


@pytest.mark.parametrize("backend", ["dense", *SPARSE])
def test_backend_in_bf16_is_close_to_fp32(backend: str) -> None:
    q, k, v, active = draw(260, 1, 2, 2, 32, 0.5, 4, torch.float32)
    exact = sparse_attention(q, k, v, active, backend="dense")
    rounded = sparse_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), active, backend=backend)  # type: ignore[arg-type]
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("backend", ["dense", *SPARSE])
def test_backend_accepts_scale_and_strided_inputs(backend: str) -> None:
    q, k, v, active = draw(70, 2, 2, 2, 16, 0.5, 5, torch.float32)
    plain = sparse_attention(q * 2, k, v, active, scale=0.25, backend=backend)  # type: ignore[arg-type]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    doubled = sparse_attention(*leaves, active, scale=0.5, backend=backend)  # type: ignore[arg-type]
    torch.testing.assert_close(plain, doubled)
    # Scaled queries with the default scale, 1 / 4, give the same; other tests check their gradients.
    expected = reference(leaves[0] * 2, leaves[1], leaves[2], active, torch.zeros(70, dtype=torch.int64))
    gradients = [torch.autograd.grad(out, leaves, torch.ones_like(out)) for out in (doubled, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q * 2, k, v, active)]
    torch.testing.assert_close(sparse_attention(*strided, scale=0.25, backend=backend), plain)  # type: ignore[arg-type]


def test_repeated_runs_are_bit_identical() -> None:
    q, k, v, active = draw(300, 2, 2, 2, 16, 0.5, 6, torch.float32)
    for backend in ("gathered", "cpu"):
        first, second = (sparse_attention(q, k, v, active, backend=backend) for _ in range(2))
        assert torch.equal(first, second)


def test_auto_chooses_only_what_can_compute_and_is_known_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def choose(share: float = 0.5, dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
        return choice.choose_backend(length=2048, share=share, dtype=dtype, device=torch.device(device))

    assert choose() == "cpu"
    assert choose(share=1.0) == "dense"
    assert choose(dtype=torch.float64) == "gathered"
    assert choose(device="cuda") == "dense"
    monkeypatch.setattr(cpu, "kernel_library", lambda: None)
    assert choose() == "gathered"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert choose() == "dense"


def test_auto_depends_on_the_share_of_active_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def choose(*, share: float, **_: Any) -> str:
        seen.append(share)
        return "dense"

    monkeypatch.setattr("moh_megatron.moh.sparse.choose_backend", choose)
    q, k, v, active = draw(10, 1, 2, 2, 16, 0.5, 1, torch.float32)
    active[:] = False
    active[..., 0] = True
    sparse_attention(q, k, v, active)
    assert seen == [0.25]


@pytest.mark.parametrize("backend", SPARSE)
def test_backend_refuses_second_derivative(backend: str) -> None:
    leaves = [x.requires_grad_() for x in draw(9, 1, 1, 2, 8, 0.5, 1, torch.float32)[:3]]
    active = torch.ones(9, 1, 2, dtype=torch.bool)
    out = sparse_attention(*leaves, active, backend=backend)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_auto_depends_on_the_length_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def choose(*, length: int, **_: Any) -> str:
        seen.append(length)
        return "dense"

    monkeypatch.setattr("moh_megatron.moh.sparse.choose_backend", choose)
    for documents in ([0, 150], [0, 30, 60, 90, 120, 150], [0, 0, 50, 150]):
        compare("auto", *draw(150, 1, 2, 2, 16, 0.5, 1, torch.float32), documents=documents)
    assert seen == [150, 30, 83]  # 83: (50 * 50 + 100 * 100) / 150


@pytest.mark.parametrize("backend", ["dense", *SPARSE])
def test_attend_packed_equals_separate_batch_rows(backend: Any) -> None:
    """Batch rows of different documents give the same together and one by one."""
    *inputs, active = draw(40, 2, 2, 2, 16, 0.5, 8, torch.float32)
    leaves = [x.requires_grad_() for x in inputs]

    def attention(*inputs: Any, cu_seqlens: Tensor | None = None) -> Tensor:
        return sparse_attention(*inputs, cu_seqlens=cu_seqlens, backend=backend)

    ends = torch.tensor([0, 10, 40, 65, 80], dtype=torch.int32)
    together = attend_packed(attention, ends, *leaves, active)
    rows = [
        attention(*(x[:, row : row + 1] for x in (*leaves, active)), cu_seqlens=ends[first : first + 3] - 40 * row)
        for row, first in ((0, 0), (1, 2))
    ]
    separate, probe = torch.cat(rows, 1), torch.randn(40, 2, 4, 16)
    torch.testing.assert_close(together, separate)
    for a, b in zip(*(torch.autograd.grad(out, leaves, probe) for out in (together, separate)), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(attend_packed(attention, None, *leaves, active), attention(*leaves, active))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4, 1, 4)}, r"^q must have shape \[S, B, N, H\]"),
        ({"k": torch.zeros(5, 1, 2, 8), "v": torch.zeros(5, 1, 2, 8)}, "^k must have shape"),
        ({"v": torch.zeros(4, 1, 4, 8)}, "^v must have the shape of k"),
        ({"k": torch.zeros(4, 1, 3, 8), "v": torch.zeros(4, 1, 3, 8)}, "must divide the 4 heads"),
        ({"active": torch.ones(4, 1, 3, dtype=torch.bool)}, "^active must have shape"),
        ({"active": torch.ones(4, 1, 4)}, "^active must be bool"),
        ({"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, "must rise from 0 to S = 4"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "^cu_seqlens must be int32"),
        ({"backend": "fast"}, "^backend must be one of"),
        ({"q": None}, "^q must be a tensor. Got NoneType"),
        ({"active": [True]}, "^active must be a tensor. Got list"),
        ({"k": torch.zeros(4, 1, 0, 8), "v": torch.zeros(4, 1, 0, 8)}, "must divide the 4 heads of q. Got 0"),
        ({"k": torch.zeros(4, 1, 2, 8, device="meta")}, r"^k must be on the device of q \(cpu\). Got meta"),
        ({"v": torch.zeros(4, 1, 2, 8, dtype=torch.float64)}, r"^v must have the type of q \(torch.float32\)"),
        (dict.fromkeys("qkv", torch.zeros(4, 1, 4, 8, dtype=torch.int64)), "^q must be floating-point numbers"),
        (dict.fromkeys("qkv", torch.zeros(4, 1, 4, 0)), r"^q must have shape \[S, B, N, H\]"),
        ({"backend": "cpu", **dict.fromkeys("qkv", torch.zeros(4, 1, 4, 8, dtype=torch.float64))}, "'cpu' needs fp32"),
    ],
)
def test_sparse_attention_refuses_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(4, 1, 4, 8),
        "k": torch.zeros(4, 1, 2, 8),
        "v": torch.zeros(4, 1, 2, 8),
        "active": torch.ones(4, 1, 4, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match=message):
        sparse_attention(**{**arguments, **change})


def test_documents_require_a_batch_of_one() -> None:
    q = torch.zeros(4, 2, 2, 8)
    with pytest.raises(ValueError, match="needs B = 1"):
        sparse_attention(
            q, q, q, torch.ones(4, 2, 2, dtype=torch.bool), cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)
        )


TRITON = """
import torch
from moh_megatron.moh import sparse_attention
for length, batch, heads, groups, size, documents in [(37, 1, 4, 2, 16, None), (20, 2, 3, 1, 12, None),
                                                      (30, 1, 4, 2, 16, [0, 7, 7, 20, 30])]:
    torch.manual_seed(0)
    leaves = [torch.randn(length, batch, n, size, requires_grad=True) for n in (heads, groups, groups)]
    active = torch.rand(length, batch, heads) < 0.5
    active[..., 0] = False
    d_out = torch.randn(length, batch, heads, size)
    cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    both = []
    for backend in ("triton", "dense"):
        out = sparse_attention(*leaves, active, scale=0.4, cu_seqlens=cu_seqlens, backend=backend)
        both.append((out, *torch.autograd.grad(out, leaves, d_out)))
    print(max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*both)))
"""


def test_triton_equals_dense_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRITON],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    errors = [float(line) for line in done.stdout.split()]
    assert len(errors) == 3
    assert max(errors) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_equals_dense_on_a_gpu(dtype: torch.dtype) -> None:
    q, k, v, active = (x.cuda() for x in draw(700, 2, 2, 4, 64, 0.5, 7, torch.float32))
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    d_out = torch.randn_like(leaves[0])
    both = []
    for backend in ("triton", "dense"):
        out = sparse_attention(*leaves, active, backend=backend)  # type: ignore[arg-type]
        both.append((out, *torch.autograd.grad(out, leaves, d_out)))
    tolerance = 2e-3 if dtype is torch.float32 else 3e-2  # TF32 products; bf16
    for a, b in zip(*both, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < tolerance


def test_triton_without_gpu_is_refused() -> None:
    q = torch.zeros(4, 1, 2, 8)
    with pytest.raises(ValueError, match="backend 'triton' needs"):
        sparse_attention(q, q, q, torch.ones(4, 1, 2, dtype=torch.bool), backend="triton")


WITHOUT_COMPILER = """
import torch
from moh_megatron.moh import sparse_attention
q, active = torch.randn(9, 1, 2, 8), torch.rand(9, 1, 2) < 0.5
out = sparse_attention(q, q, q, active, backend="cpu")
print(float((out - sparse_attention(q, q, q, active, backend="dense")).abs().max()) < 1e-5)
"""
BUILD = "from moh_megatron.moh.backends.cpu import kernel_library; print(kernel_library() is not None)"


def _build(program: str = BUILD, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_concurrent_builds_succeed_despite_an_abandoned_lock(tmp_path: Any) -> None:
    (tmp_path / "moh_megatron").mkdir()
    (tmp_path / "moh_megatron" / "lock").touch()
    ranks = [_build(TORCH_EXTENSIONS_DIR=str(tmp_path)) for _ in range(2)]
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == ["True", "True"]
    assert len(list((tmp_path / "moh_megatron").glob("*.so"))) == 1
    assert not list((tmp_path / "moh_megatron").glob(".build-*"))


def test_missing_compiler_gives_one_warning_and_falls_back(tmp_path: Any) -> None:
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "/no/such/compiler"}
    out, err = _build(WITHOUT_COMPILER, **environment).communicate(timeout=120)
    assert out.strip() == "True", err
    assert err.count("cannot be built") == 1
    assert "/no/such/compiler" in err


def test_cpu_kernel_can_be_compiled() -> None:
    assert cpu.kernel_library() is not None
