"""Process groups, gradient rules of replicated tensors, random states, and CPU replacements for CUDA calls."""
