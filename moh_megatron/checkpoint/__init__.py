"""Checkpoints: our own sharded form, and the way to Hugging Face's."""
