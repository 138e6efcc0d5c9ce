"""The shard set: its format, how it is written, joined, indexed and verified."""
