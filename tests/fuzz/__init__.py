"""Fuzzing of every parser of untrusted bytes: `make fuzz` runs it, `test_corpus.py` replays the files it found."""
