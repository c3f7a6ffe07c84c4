"""Trains: the launcher, the loop, the engine, validation, and what a run records."""
