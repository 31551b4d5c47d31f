"""What leaves the training code: export, artifact, loader."""
