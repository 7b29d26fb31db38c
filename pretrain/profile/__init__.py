"""`python -m pretrain.profile`: where the time of a training step goes."""
