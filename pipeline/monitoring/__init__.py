"""Reports of a job: progress, curves, speed, and the machine."""
