"""The bytes of an image file → a clean image of the size of the network."""
