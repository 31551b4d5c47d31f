"""What is saved, where, and whether it fits the run that loads it."""
