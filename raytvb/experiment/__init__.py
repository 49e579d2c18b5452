"""What an experiment file says, and what everything it makes is called in a store."""
