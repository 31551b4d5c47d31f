"""What a plan looks like, to a person and to a machine."""
