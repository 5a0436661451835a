"""Tables that carry public PyTorch checkpoints into this code base and back."""
