"""Where tables live: plans, the planner, initial rows. Knows tables; knows no model and no loop."""
