"""The two files copied into every export: they import nothing of this package but each other."""
