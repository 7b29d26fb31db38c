"""Images on disk: data sets, folders, shards, decoding, the processes that load them."""
