"""Parquet files -> checked, encoded, permuted rows as NumPy arrays. Imports no torch, so that serving and data tools run without it."""
