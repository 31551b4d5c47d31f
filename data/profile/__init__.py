"""What files say before anyone trains on them: infer, fit, check."""
