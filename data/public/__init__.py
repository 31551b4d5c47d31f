"""Public data sets' own files -> Parquet splits and a fitted schema."""
