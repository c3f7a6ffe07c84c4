"""Handles lost ranks, signals, bad steps, ranks that disagree, and two runs in one folder."""
