"""Labelled images: where they come from, which are train, val and test, and how they are
decoded.
"""
