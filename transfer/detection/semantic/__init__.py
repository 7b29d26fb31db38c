"""Semantic segmentation in detectron2: image and label files, networks, learning rate, scores of pixels."""
