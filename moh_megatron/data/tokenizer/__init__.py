"""Loads tokenizers, and trains, converts and grows them."""
