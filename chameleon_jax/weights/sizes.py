"""What a config says of its weights, and what weights say of their config."""

from __future__ import annotations

# Fields of the networks' configs that are not sizes: weights fit whatever they are.
HOW_TO_COMPUTE = ("conv", "remat", "scan_layers", "attention")
