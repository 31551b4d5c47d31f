"""The scorer that stays up: HTTP, coalescing, models that change without a restart. Imports nothing of the training code."""
