"""Task vector bases of an experiment: the Gram matrix, fits and online bases.

Bases are written block by block. `builder` says in which order to read the room.
"""
