"""Quality of samples: images → features → metrics."""
