"""Reads the JSON-lines files that users bring and turns their records into ragged examples."""
