"""Process groups, the CPU stand-ins Megatron-core needs, and the gradient rules of replicated weights."""
