"""A random model of a few thousand parameters, pictures, and a server with both."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from chameleon_jax.config import load_config
from chameleon_jax.inference import Pipeline
from tests.serving.client import Server

OVERRIDES = ["video.height=64", "video.width=48", "sampler.steps=2"]


@pytest.fixture(scope="session")
def pipeline():
    made = Pipeline.random(load_config("configs/runway_tiny.py:smoke", OVERRIDES), 0)
    made.compile()
    return made


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for seed, name in enumerate(("person", "dress", "shirt", "coat")):
        pixels = np.random.default_rng(seed).integers(0, 255, (8, 6, 3), np.uint8)
        Image.fromarray(pixels).resize((48, 64)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def server(pipeline, pictures):
    with Server(pipeline, pictures) as running:
        yield running
