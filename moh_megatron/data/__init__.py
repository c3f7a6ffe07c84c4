"""Prepares datasets (prepare/, tokenizer/) and reads them for training."""
