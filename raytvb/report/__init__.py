"""The report of a run: a typed summary of the store, its text, its plots and its page."""
