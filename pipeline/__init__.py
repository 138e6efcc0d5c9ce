"""images → shards → batches → loss → checkpoint → samples → figures."""
