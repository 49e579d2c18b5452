"""Benchmarks. Each compares two algorithms in one process. No other package imports this one."""
