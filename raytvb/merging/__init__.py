"""A chosen mixture of task vectors written as one checkpoint."""
