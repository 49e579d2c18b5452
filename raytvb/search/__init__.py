"""The search over bases and coefficients, from candidates to the choice, on validation images.

Read `candidates` first. It defines the ways to add tasks that are compared, and says what the
other modules do. Nothing here knows Ray: `orchestration.tune` runs the trials.
"""
