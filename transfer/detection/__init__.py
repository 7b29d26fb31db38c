"""Conversion to detectron2 with proof, fine-tuning there, AP: the only importer of detectron2."""
