"""Hugging Face folders: read, written, converted, verified."""
