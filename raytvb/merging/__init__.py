"""Writes a mixture of task vectors as one checkpoint."""
