"""Bytes and seconds of a plan."""
