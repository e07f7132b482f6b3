"""Prompts of our own, one file a task, read by `evaluation.workloads`."""
