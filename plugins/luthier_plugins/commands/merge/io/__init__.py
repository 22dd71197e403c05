"""What a merge reads and writes: weights, adapters, shards, hashes, its journal."""
