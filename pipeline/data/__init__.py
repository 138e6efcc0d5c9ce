"""From image files to the batches of a training step: images, sources, shards, loading."""
