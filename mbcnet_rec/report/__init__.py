"""Self-contained pages of a run or a study, and their figures."""
