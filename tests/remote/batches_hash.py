"""In a process of its own: what the loader gives of a shard set, as hashes, and how often reading was repeated."""

import hashlib
import json
import sys
from itertools import islice

from pipeline.data.loading.batches import Batches
from pipeline.data.loading.order import Order
from pipeline.data.shards.shard_set import ShardSet
from pipeline.storage import files

if __name__ == "__main__":
    shards = ShardSet.open(sys.argv[1])
    before = files.retries()
    order = Order(seed=3, shard_samples=shards.shard_samples, global_batch=120, lanes=12, window=16)
    digests = {name: hashlib.sha256() for name in ("positions", "labels", "images")}
    workers = int(sys.argv[2])
    with Batches(shards, order, rank=0, world_size=1, first_sample=0, workers=workers, flip=True) as batches:
        for batch in islice(batches, 20):  # more than an epoch of the digits
            for name, digest in digests.items():
                digest.update(getattr(batch, name).numpy().tobytes())
        result = {name: digest.hexdigest() for name, digest in digests.items()}
        print(json.dumps([result, batches.io_retries - before]))
