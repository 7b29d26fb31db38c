"""Which network has a file's keys and shapes: a module a family of architectures, all of timm's."""
