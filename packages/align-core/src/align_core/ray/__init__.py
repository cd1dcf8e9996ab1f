"""Processes by Ray: the only place that imports it. A single controller drives worker groups and an engine."""
