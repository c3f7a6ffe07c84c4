"""Configuration: typed values, read from YAML and the command line. Imports neither torch nor other parts of ours."""
