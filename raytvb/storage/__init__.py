"""The files of a store: objects, records, masks, vectors, bases and Gram matrices.

This is the only room that imports fsspec. `store` says in which order to read it.
"""
