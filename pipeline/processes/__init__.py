"""Worker processes and threads: a pool, the fork server, prefetching, periodic calls."""
