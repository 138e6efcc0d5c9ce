"""Local and remote files alike: open, list, retry, publish, remove."""
