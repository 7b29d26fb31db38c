"""Images from disk to augmented batches: data sets, shards, decoding, augmentation, loading."""
