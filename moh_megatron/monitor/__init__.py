"""What a run tells: metrics files, TensorBoard, summaries."""
