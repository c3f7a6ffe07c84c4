"""Defines the commands that the scripts in ``pipelines/`` and the console scripts run."""
