"""Runs an experiment on a Ray cluster. No other package of raytvb imports Ray."""
