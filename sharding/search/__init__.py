"""Which plan: the planner, balance and capacity."""
