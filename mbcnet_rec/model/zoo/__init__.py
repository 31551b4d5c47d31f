"""Models to compare MBCnet with, one file each."""
