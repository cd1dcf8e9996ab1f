"""Losses, advantages, KL estimators and log-prob kernels of alignment, as pure torch functions."""
