"""Datasets: what prepares them and what training reads."""
