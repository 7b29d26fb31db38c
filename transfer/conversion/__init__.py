"""A ResNet from timm's names to detectron2's and back, proved to compute the same."""
