"""The training run: launcher, loop, engine, schedule, signals."""
