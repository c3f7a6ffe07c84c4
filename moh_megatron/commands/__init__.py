"""The commands: their arguments, and what they call. The scripts in ``pipelines/`` and the console scripts run them."""
