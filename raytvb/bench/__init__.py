"""Benchmarks, each a ratio measured in one process. No other room imports this one."""
