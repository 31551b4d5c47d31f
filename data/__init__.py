"""What enters: schemas, Parquet, batches. Knows torch, torchrec and pyarrow; knows no model."""
