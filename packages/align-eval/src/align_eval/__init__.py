"""Task accuracy and judge evaluation of aligned models."""
