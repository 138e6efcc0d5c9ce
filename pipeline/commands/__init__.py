"""The options of each command, and the call of its job. Jobs are imported in the call: `ddpm --help` is quick."""
