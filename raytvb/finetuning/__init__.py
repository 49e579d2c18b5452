"""The fine-tune of one task: its mask, its training, and what it leaves in the store."""
