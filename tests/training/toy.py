"""A stage that trains in milliseconds: a two-layer network learns to repeat its input.

Tests also run it as a program:

    python tests/training/toy.py WORKDIR STEPS [key=value ...]
"""

from __future__ import annotations

import functools
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
from chameleon_jax.sharding import to_host
from chameleon_jax.training import loop
from chameleon_jax.training.networks import Network, weights_file
from chameleon_jax.training.stage import Stage, simple_stage


class Toy(nnx.Module):
    """Two linear layers with a kernel that fsdp can split."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(16, 64, rngs=rngs), nnx.Linear(64, 16, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](jax.nn.gelu(self.layers[0](x)))


def stage(config: ConfigDict, name: str = "toy", feed=None) -> Stage:
    network = Network(lambda rngs: Toy(rngs=rngs))

    def loss(params, frozen, batch, key):
        del frozen
        noisy = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
        value = jnp.mean(jnp.square(network.bind(params["toy"])(noisy) - batch["x"]))
        return value * batch["scale"].mean(), {"error": value}

    return simple_stage(
        config,
        name,
        trained={"toy": network},
        weights={"toy": weights_file(config.init_from, "toy")} if config.init_from else {},
        loss=loss,
        preview=functools.partial(show, network),
        batches=feed or (lambda source: ToyFeed()),
        eval_batches=lambda source: ToyFeed(),
    )


def show(network: Network, params, frozen, batch, key) -> tuple[np.ndarray, dict[str, float]]:
    """A preview: what the network makes of the batch, uint8 [8, 16, 3], and its contrast."""
    del frozen, key
    made = to_host(network.bind(params["toy"])(batch["x"]))
    picture = np.repeat(np.uint8(np.clip(128 + 40 * made, 0, 255))[..., None], 3, axis=-1)
    true = to_host(batch["x"])
    return picture, {"sample/contrast_ratio": float(made.std() / true.std())}


class ToyFeed:
    """Batch n holds the n-th normal numbers; `poison` is a batch that is not finite.

    While batch `kill` is made, the process gets a signal, once the checkpoint `after` (if any) is
    complete.
    """

    parts = ()

    def __init__(
        self,
        poison: int = -1,
        kill: int = -1,
        signal_number: int = signal.SIGKILL,
        after: Path | None = None,
    ):
        self.count, self.poison = 0, poison
        self.kill, self.signal, self.after = kill, signal_number, after

    def __next__(self):
        if self.count == self.kill:
            deadline = time.monotonic() + 60
            while (
                self.after is not None and not self.after.is_dir() and time.monotonic() < deadline
            ):
                time.sleep(0.02)
            os.kill(os.getpid(), self.signal)
        x = np.random.default_rng(self.count).normal(size=(8, 16)).astype(np.float32)
        scale = np.full(8, np.nan if self.count == self.poison else 1.0, np.float32)
        self.count += 1
        mine = np.split(np.arange(8), jax.process_count())[jax.process_index()]
        return {"x": x[mine], "scale": scale[mine]}

    def counts(self):
        return {"data/broken": 0.0}

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state, *, allow_changes=False):
        self.count = state["count"]


def config(workdir, steps: int, overrides=()) -> ConfigDict:
    result = ConfigDict(
        {
            "workdir": str(workdir),
            "seed": 0,
            "init_from": "",
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
            "train": {
                "steps": steps,
                "max_minutes": 0.0,
                "log_every": 1,
                "eval_every": 0,
                "preview_every": 0,
                "checkpoint_every": 3,
                "keep": 2,
                "best": "",
                "best_mode": "min",
            },
            "optimizer": {
                "name": "adamw",
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.01,
                "clip": 1.0,
            },
            "schedule": {"name": "constant", "peak": 1e-2, "warmup": 2},
            "ema": {"decay": 0.9, "start": 0},
            "alarms": {
                "action": "stop",
                "explosion": 20.0,
                "contrast": 0.3,
                "motion": 0.7,
                "colour": 1.15,
                "checks": 3,
                "arm_after": 0,
            },
        }
    )
    override(result, overrides)
    return result


def main() -> None:
    workdir, steps, *rest = sys.argv[1:]
    logger = logging.getLogger("chameleon_jax")
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    jax.config.update("jax_default_matmul_precision", "highest")
    given = dict(item.split("=") for item in rest)
    names = ("kill", "term", "int", "rank", "port", "eval", "changed")
    own = {name: int(given.pop(name)) for name in names if name in given}
    if "rank" in own:
        jax.distributed.initialize(
            f"localhost:{own['port']}", num_processes=2, process_id=own["rank"]
        )
    feed = ToyFeed()
    if "term" in own:
        feed = ToyFeed(kill=own["term"], signal_number=signal.SIGTERM)
    elif "int" in own and own.get("rank", 0) == 0:  # of several processes the first one only
        feed = ToyFeed(kill=own["int"], signal_number=signal.SIGINT)
    elif "kill" in own:
        feed = ToyFeed(kill=own["kill"], after=Path(workdir, "checkpoints", "3"))
    settings = config(workdir, int(steps), [f"{key}={value}" for key, value in given.items()])
    held_out = [next(ToyFeed()) for _ in range(own.get("eval", 0))]
    outcome = loop.train(
        settings, stage(settings), feed, held_out, resume_with_changes="changed" in own
    )
    flat = to_host(dict(outcome.state.params["toy"]))
    average = to_host(dict(outcome.state.ema["toy"]))
    flat |= {f"ema.{name}": value for name, value in average.items()}
    if jax.process_index() == 0:
        np.savez(os.path.join(workdir, "params.npz"), **flat)
    print(outcome.step, outcome.reason)


if __name__ == "__main__":
    main()
