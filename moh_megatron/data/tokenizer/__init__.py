"""Tokenizers: one loader, and those that are trained, imported or grown."""
