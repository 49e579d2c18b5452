"""What is measured once on the test images, after the search has chosen.

Read `plan` first. It lists the evaluations, and says what the other modules do. Nothing here knows
Ray: `orchestration.evaluation_service` runs the evaluations.
"""
