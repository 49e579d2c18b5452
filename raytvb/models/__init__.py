"""open_clip models and their heads: loading, storing, and measuring accuracies with merged
weights.
"""
