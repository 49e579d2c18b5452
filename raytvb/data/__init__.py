"""Labelled images: where they come from, which are train, val and test, and how they are decoded.

Read `image_source` first, which has what all kinds of data have in common. `parquet`, `folders` and
`torchvision_sets` are the three kinds. `suite_files` writes the embedded suite as Parquet.
`open_source` finds out which kind a URL holds. `splits` picks train, val and test, `decoding` turns
encoded images into pixels (as `preprocess` says), and `load_split` puts these together.
`split_cache` keeps decoded splits in a store.
"""
