"""Defines patterns of messages that several tests match."""

NONE_IS = r"(must be|cannot be read as JSON \(.*\)\. Expected)"
"""Precedes the description of what was expected, in messages about a JSON file with other content."""
