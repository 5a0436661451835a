"""Packaging. The core runs inference anywhere JAX runs; heavier things, as torch, are extras."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (HERE / "chameleon_jax/__init__.py").read_text()
).group(1)

CORE = [
    "jax>=0.10,<0.13",
    "flax>=0.12.8,<0.13",
    "numpy>=2.0",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12,<0.13",
    "chex>=0.1.91",
    "einops>=0.8",
    "ml-collections>=1.1",
    "tensorflow-datasets>=4.9.10",
    "grain>=0.2.18",
    "absl-py>=2.1",
    "safetensors>=0.5",
    "tokenizers>=0.21",
    "huggingface-hub>=0.34",
    "ftfy>=6.3",
    "pillow>=11.0",
    "tqdm>=4.66",
]
EXTRAS = {
    "cuda13": ["jax[cuda13]>=0.10,<0.13"],
    "tpu": ["jax[tpu]>=0.10,<0.13"],
    "video": ["av>=14.0,<20"],
    "serve": [
        "av>=14.2,<20",
        "starlette>=1.0,<2",
        "uvicorn>=0.40",
        "websockets>=15",
    ],
    "runway": ["numba>=0.62", "av>=14.0,<20"],
    "train": [
        "array-record>=0.8",
        "av>=14.0,<20",
        "importlib-resources>=6.0",  # tensorflow-datasets 4.9.10 imports it and does not name it
        "tensorboardX>=2.6.4",
    ],
    "eval": ["av>=14.0,<20", "onnxruntime>=1.20", "opencv-python-headless>=4.10,<6"],
    # To make the files of metrics whose weights or code are for research only; docs/evaluation.md.
    "eval-nc": ["insightface>=0.7.3", "onnx>=1.17", "pyiqa>=0.1.14", "torch>=2.6"],
    "curation": [
        "opencv-python-headless>=4.11,<6",
        "scenedetect-headless>=0.7,<0.8",
        "av>=14.0,<20",
        "array-record>=0.8",
        "importlib-resources>=6.0",
    ],
    "ray": ["ray[data]>=2.60,<3"],
    "convert": ["torch>=2.6"],  # for .pth, .pt and .bin; safetensors need nothing
    "parity": [
        "torch>=2.6",
        "diffusers>=0.42,<0.43",
        "transformers>=5,<6",
        "sentencepiece>=0.2",
        "peft>=0.17",
    ],
    "dev": ["httpx2>=2.0", "onnx>=1.17", "pytest>=8.0", "pytest-xdist>=3.6", "ruff>=0.14"],
}

setup(
    name="chameleon-jax",
    version=VERSION,
    description="Real-time, interactive garment video in JAX",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["chameleon_jax*", "configs*", "launch*", "converters*"]),
    include_package_data=True,
    package_data={
        "chameleon_jax": ["assets/**/*", "serving/page/*", "serving/schema.json"],
        "launch": ["*.sh", "*.yaml"],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["chameleon=launch.__main__:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
