"""Meters, the metrics file and the live line: everything that observes a run.

The training loop hands numbers in; nothing here ever steers the run, and nothing here that fails
(a full disk, a closed terminal) stops it.
"""
