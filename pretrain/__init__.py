"""Spectral transformation, INTL, and the training of a timm ResNet with it."""
