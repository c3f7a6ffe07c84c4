"""Streaming rows: torch's threads while it lasts, and after."""

import torch

from moh_megatron.checkpoint.hf.streaming import one_thread


def test_torch_works_in_one_thread_and_then_in_as_many_as_before():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
