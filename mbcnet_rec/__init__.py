"""MBCnet (arXiv 2411.13057): model, training, command line."""
