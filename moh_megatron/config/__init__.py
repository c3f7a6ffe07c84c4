"""Configuration: typed values, read from YAML and the command line. Imports no torch."""
