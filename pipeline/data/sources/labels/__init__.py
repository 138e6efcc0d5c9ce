"""The class of each image: labels are found, read, numbered, and compared by name."""
