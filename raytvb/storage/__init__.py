"""Files of a store: objects, records, masks, vectors, bases and Gram matrices. The only room that
imports fsspec.
"""
