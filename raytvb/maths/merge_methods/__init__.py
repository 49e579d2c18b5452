"""The built-in merge methods, one a file; `merge_registry` imports them all by itself."""
