"""Settings shared by all tests: float32 products at full precision on every backend."""

from __future__ import annotations

import jax

jax.config.update("jax_default_matmul_precision", "highest")
