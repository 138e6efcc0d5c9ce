"""The mathematics of diffusion: schedules, objectives, samplers, likelihood. Pure; the network is a callable."""
