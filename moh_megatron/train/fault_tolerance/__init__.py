"""Lost ranks, signals, bad steps: what a run does when something goes wrong."""
