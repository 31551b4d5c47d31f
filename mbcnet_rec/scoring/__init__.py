"""One scorer, and what folds over it: metrics, evaluate, predict."""
