"""Detection and segmentation in detectron2: fine-tuning, AP, pictures, what a run will cost."""
