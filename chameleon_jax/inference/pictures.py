"""Pictures as a stream takes them: of a person or a garment, plain or encoded ahead."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from chameleon_jax.data.images import prepare_garment, prepare_reference

PREPARE = {"reference": prepare_reference, "garment": prepare_garment}


@dataclasses.dataclass(frozen=True)
class EncodedPicture:
    """A picture that the VAE has seen already, so that no stream waits for it.

    Attributes:
      kind: "reference" or "garment".
      pixels: uint8 [h, w, 3], as `data.images` prepares them.
      latent: [1, 1, h, w, c], on the device.
    """

    kind: str
    pixels: np.ndarray
    latent: jax.Array
