"""The model: tensors in, logits out. It knows no rank, no file and no config reader."""
