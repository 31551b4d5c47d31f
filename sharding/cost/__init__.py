"""Bytes and seconds of a plan. Imports no torch."""
