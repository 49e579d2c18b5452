"""What is measured after the search has chosen: additions, negation, unseen tasks, and more."""
