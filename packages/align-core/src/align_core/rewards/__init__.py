"""Rewards of completions: where they come from, and the processes that run them apart from the training run."""
