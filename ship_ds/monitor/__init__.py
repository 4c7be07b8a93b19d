"""What a run shows while it goes: metrics.jsonl, TensorBoard, the progress bar and loss.png."""
