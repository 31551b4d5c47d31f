"""What a run writes while it trains: metrics.jsonl, TensorBoard, MLflow, the progress bar."""
