"""The built-in basis methods, one a file; `basis_registry` imports them all by itself."""
