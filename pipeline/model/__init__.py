"""The network, its moving average, and its names in `diffusers`."""
