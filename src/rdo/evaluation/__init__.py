"""Measuring scorers and policies: plain numbers with their uncertainty, never a bare percentage."""

# What stage eval leaves: the numbers, and of a policy its responses, one line a prompt.
EVALUATION = "evaluation.json"
GENERATIONS = "generations.jsonl"
