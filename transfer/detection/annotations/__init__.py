"""Annotation files in COCO's format: checked and mended, and shares of their labels."""
