"""Readers and writers of checkpoint directories. None of them knows a layout rule: those come from the weight plan."""
