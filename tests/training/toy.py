"""A stage that trains in milliseconds: a two-layer network learns to repeat its input. Also run as a program by tests.

python tests/training/toy.py WORKDIR STEPS [key=value ...]
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from chameleon_jax.config import override
from chameleon_jax.training import loop
from chameleon_jax.training.networks import Network
from chameleon_jax.training.state import Stage


class Toy(nnx.Module):
    """Two linear layers with a kernel that fsdp can split."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(16, 64, rngs=rngs), nnx.Linear(64, 16, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](jax.nn.gelu(self.layers[0](x)))


def stage(name: str = "toy") -> Stage:
    network = Network(lambda rngs: Toy(rngs=rngs))

    def loss(params, frozen, batch, key):
        del frozen
        noisy = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
        value = jnp.mean(jnp.square(network.bind(params["toy"])(noisy) - batch["x"]))
        return value * batch["scale"].mean(), {"error": value}

    def preview(params, frozen, batch, key):
        return np.full((4, 4, 3), 128, np.uint8)

    return Stage(name, {"toy": network}, loss, preview)


class ToyFeed:
    """Batch n holds the n-th normal numbers; `poison` is a batch that is not finite.

    While batch `kill` is made, the process gets a signal, once the checkpoint `after` (if any) is complete.
    """

    def __init__(
        self, poison: int = -1, kill: int = -1, signal_number: int = signal.SIGKILL, after: Path | None = None
    ):
        self.count, self.poison = 0, poison
        self.kill, self.signal, self.after = kill, signal_number, after

    def __next__(self):
        if self.count == self.kill:
            deadline = time.monotonic() + 60
            while self.after is not None and not self.after.is_dir() and time.monotonic() < deadline:
                time.sleep(0.02)
            os.kill(os.getpid(), self.signal)
        rng = np.random.default_rng(self.count)
        scale = np.full(8, np.nan if self.count == self.poison else 1.0, np.float32)
        self.count += 1
        return {"x": rng.normal(size=(8, 16)).astype(np.float32), "scale": scale}

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]


def config(workdir, steps: int, overrides=()) -> ConfigDict:
    result = ConfigDict({
        "workdir": str(workdir),
        "seed": 0,
        "init_from": "",
        "weights": {"toy": ""},
        "mesh": {"data": 1, "fsdp": -1, "seq": 1, "tensor": 1},
        "train": {
            "steps": steps, "max_minutes": 0.0, "log_every": 1, "eval_every": 0, "preview_every": 0,
            "checkpoint_every": 3, "keep": 2,
        },
        "optimizer": {
            "name": "adamw", "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "clip": 1.0, "momentum": 0.95,
        },
        "schedule": {"name": "constant", "peak": 1e-2, "warmup": 2, "decay_from": 0.5, "final": 0.0, "halve_at": 3},
        "ema": {"decay": 0.9, "start": 0},
    })  # fmt: skip
    override(result, overrides)
    return result


def main() -> None:
    workdir, steps, *rest = sys.argv[1:]
    logger = logging.getLogger("chameleon_jax")
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    jax.config.update("jax_default_matmul_precision", "highest")
    kill = [int(item[5:]) for item in rest if item.startswith("kill=")]
    term = [int(item[5:]) for item in rest if item.startswith("term=")]
    if term:
        feed = ToyFeed(kill=term[0], signal_number=signal.SIGTERM)
    elif kill:
        feed = ToyFeed(kill=kill[0], after=Path(workdir, "checkpoints", "3"))
    else:
        feed = ToyFeed()
    overrides = [item for item in rest if not item.startswith(("kill=", "term="))]
    outcome = loop.train(config(workdir, int(steps), overrides), stage(), feed)
    flat = {name: np.asarray(value) for name, value in outcome.state.params["toy"].items()}
    flat |= {f"ema.{name}": np.asarray(value) for name, value in outcome.state.ema["toy"].items()}
    np.savez(os.path.join(workdir, "params.npz"), **flat)
    print(outcome.step, outcome.reason)


if __name__ == "__main__":
    main()
