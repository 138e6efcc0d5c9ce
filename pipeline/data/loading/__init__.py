"""Which sample comes when, and the batches of one rank."""
