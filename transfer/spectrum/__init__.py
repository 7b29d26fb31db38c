"""Which spectral transformations avoid collapse: a study on a small data set."""
