"""One run: its steps, its state, how it starts and resumes."""
