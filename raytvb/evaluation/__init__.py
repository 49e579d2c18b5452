"""What is measured once on the test images, after the search has chosen.

Read `plan` first: which evaluations there are, and what the other modules do. Nothing here knows
Ray: `orchestration.evaluation_service` runs the evaluations.
"""
