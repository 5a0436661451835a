"""Real-time, interactive garment video in JAX: FashionChameleon (arXiv 2605.15824) on the
Wan2.2-TI2V-5B backbone.
"""

__version__ = "0.1.0"
