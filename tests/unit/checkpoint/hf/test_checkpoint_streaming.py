"""streaming: the number of threads of torch during a conversion and after it."""

import torch

from moh_megatron.checkpoint.hf.streaming import one_thread


def test_one_thread_limits_torch_and_restores_its_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
