"""Measures a run and shows it: metrics files, TensorBoard, alarms, counts of operations."""
