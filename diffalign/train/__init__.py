"""Training: one loss step, two loops, and the run directory they share."""
