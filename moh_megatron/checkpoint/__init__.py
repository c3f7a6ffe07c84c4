"""Writes and reads checkpoints of a run; ``hf`` converts them from and to Hugging Face folders."""
