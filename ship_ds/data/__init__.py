"""Tasks: real formats and generated rules -> Task -> splits -> task-major batches."""
