"""Judging a self-supervised ResNet checkpoint."""
