"""Measures how good a model is: validation loss, lm-eval's tasks, comparisons with other models."""
