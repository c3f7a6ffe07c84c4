"""Patterns of messages that several tests ask for."""

NONE_IS = r"(must be|cannot be read as JSON \(.*\)\. Expected)"
"""Of a JSON file that is not what was expected: before the name of that."""
