"""Backends of sparse attention: each computes causal attention where every token uses only some heads.

All functions compute causal softmax attention. From the layer down to the kernels they are:

- ``MoHSelfAttention`` (moh/attention.py) is the MoH layer: projections, router, one of the functions below, gates.
- ``CausalAttention`` (model/core_attention.py) is the dense twin's core attention; it calls ``causal_attention``.
- ``attend_packed`` (moh/packed_documents.py) wraps one of the functions below for a batch of packed documents.
- ``attend_every_head`` (moh/attention.py) is ``causal_attention`` in place of ``sparse_attention``, for gradients of
  all gates.
- ``sparse_attention`` (moh/sparse.py) is public: it checks its inputs, chooses a backend and calls it.
- ``masked_attention`` (dense.py) is the reference backend: ``causal_attention`` with zeros where inactive.
- ``causal_attention`` (dense.py) computes every head by torch's fused kernel.
- ``ragged_attention`` (ragged_function.py) computes active (token, head) pairs only; its kernel is ``GatheredKernel``
  (gathered.py), ``CpuKernel`` (cpu.py) or ``TritonKernel`` (triton_kernel.py).

Exported models have their own ``attend_active`` (checkpoint/hf/hf_model/modeling_moh.py): it must not import this.
"""
