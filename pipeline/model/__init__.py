"""The network, its moving average (EMA), and its conversion from and to `diffusers`."""
