"""Processes, exit codes, preemption and the watchdog."""
