"""Published checkpoints by name (`--weights zoo:NAME`), fetched once, and the figures published of them."""
