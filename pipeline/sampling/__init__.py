"""A trained network and the images that it makes from seeds."""
