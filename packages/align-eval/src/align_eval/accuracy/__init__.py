"""Accuracy on tasks whose answers a program can check."""
