"""The only place that knows DeepSpeed, ranks and checkpoints."""
