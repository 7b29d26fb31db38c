"""Random views of images: crops and colours drawn from a hash, made by loader processes or on the device."""
