"""The mathematics of diffusion: schedules, losses, samplers, likelihood. Pure; the network is a callable."""
