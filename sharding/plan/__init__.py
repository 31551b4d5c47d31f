"""The plan file, the cluster it was made for, and what the planner may do."""
