"""What exists only to be fast on a CPU, behind `train.cpu_fast_path`."""
