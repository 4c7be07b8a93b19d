"""More tasks for few: verbs that write tasks in our JSONL, each with its origin."""
