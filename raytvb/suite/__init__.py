"""The task suite that comes with the package: glyph images made on the spot, and a small model
trained on them.
"""
