"""Jobs of many processes: ranks, signals, the lease of a run, heartbeats, failures, requeueing."""
