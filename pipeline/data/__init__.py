"""Pictures to shards and shards to batches: what lies between a folder of images and a tensor."""
