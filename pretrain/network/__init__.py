"""Networks: the backbone, projector and target encoder, and two layers that torch lacks."""
