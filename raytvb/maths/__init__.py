"""The mathematics of task vectors and bases: tensors in, tensors out, nothing else known."""
