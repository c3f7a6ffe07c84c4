"""Megatron-core's GPTModel, configured as a LLaMA-like decoder with Mixture-of-Head attention."""
