"""Directories, archives, tables, arrays → name, bytes and label of each input."""
