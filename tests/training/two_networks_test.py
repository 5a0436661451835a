"""The contract between stage and loop, with all that distillation needs.

A generator and a critic with an optimiser each, a frozen network, several starting points, an
average of the generator alone, and two kinds of steps in turn: through the same loop.
"""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from chameleon_jax.training import loop
from chameleon_jax.training.networks import Network
from chameleon_jax.training.stage import Stage
from chameleon_jax.training.state import descend, new_state
from chameleon_jax.weights.params import save_params
from tests.training import toy

CRITIC_STEPS = 5  # for each step of the generator


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with the weights of two networks that training starts from."""
    folder = tmp_path_factory.mktemp("weights")
    network = Network(lambda rngs: toy.Toy(rngs=rngs))
    for number, name in enumerate(("score", "student")):
        params = network.init(jax.random.key(number))
        save_params(folder / f"{name}.safetensors", network.bind(params))
    return folder


def make_stage(weights, critic_rate=2e-3) -> Stage:
    """The generator follows the difference between a frozen score and a critic."""
    network = Network(lambda rngs: toy.Toy(rngs=rngs))
    generator_optimizer, critic_optimizer = optax.adam(1e-2, b1=0.0), optax.adam(critic_rate)

    def generate(params, batch, key):
        noise = jax.random.normal(key, batch["x"].shape)
        return network.bind(params["generator"])(noise)

    def generator_loss(params, fixed, batch, key):
        made = generate(params, batch, key)
        real, fake = (network.bind(fixed[name])(made) for name in ("real", "critic"))
        target = jax.lax.stop_gradient(made - (fake - real))
        return jnp.square(made - target).mean(), {}

    def critic_loss(params, fixed, batch, key):
        made = generate(fixed, batch, key)
        return jnp.square(network.bind(params["critic"])(made) - batch["x"]).mean(), {}

    def key_of(number, step):
        return jax.random.fold_in(jax.random.key(number), step)

    descend_generator = descend(
        generator_loss, generator_optimizer, functools.partial(key_of, 0), ema_decay=0.9
    )
    descend_critic = descend(critic_loss, critic_optimizer, functools.partial(key_of, 1))

    def init(params):
        return {
            "generator": new_state(
                {"generator": params["generator"]}, generator_optimizer, ema=True
            ),
            "critic": new_state({"critic": params["critic"]}, critic_optimizer, ema=False),
        }

    def critic_step(state, frozen, batch):
        fixed = frozen | state["generator"].params
        critic, metrics = descend_critic(state["critic"], fixed, batch)
        named = {f"critic/{name}": metrics[name] for name in ("loss", "grad_norm")}
        return state | {"critic": critic}, named

    def both_steps(state, frozen, batch):
        fixed = frozen | state["critic"].params
        generator, metrics = descend_generator(state["generator"], fixed, batch)
        state, others = critic_step(state | {"generator": generator}, frozen, batch)
        return state, others | {"generator/loss": metrics["loss"]}

    def exported(state, frozen):
        return {"generator": state["generator"].inference_params["generator"]}

    def turn(number):
        return "critic" if number % CRITIC_STEPS else "both"

    def evaluate(state, frozen, batch, key):
        loss, _ = generator_loss(
            state["generator"].inference_params, frozen | state["critic"].params, batch, key
        )
        return {"distance": loss}

    def preview(state, frozen, batch, key):
        return np.zeros((4, 4, 3), np.uint8), {}

    return Stage(
        name="two_networks",
        trained={"generator": network, "critic": network},
        frozen={"real": network},
        weights={
            "generator": weights / "student.safetensors",
            "critic": weights / "score.safetensors",
            "real": weights / "score.safetensors",
        },
        init=init,
        steps={"critic": critic_step, "both": both_steps},
        turn=turn,
        evaluate=evaluate,
        preview=preview,
        exported=lambda state, frozen: {
            "generator": state["generator"].inference_params["generator"]
        },
        batches=lambda source: toy.ToyFeed(),
        eval_batches=lambda source: toy.ToyFeed(),
        shown=("critic/loss", "generator/loss"),
    )


def train(workdir, steps, weights, **options):
    settings = toy.config(workdir, steps, ["mesh.fsdp=1", "train.eval_every=4"])
    held_out = [next(toy.ToyFeed())]
    return loop.train(settings, make_stage(weights), toy.ToyFeed(), held_out, **options)


def test_two_networks_train_and_resume_to_the_bit(tmp_path, weights, caplog):
    with caplog.at_level("INFO", logger="chameleon_jax"):
        whole = train(tmp_path / "whole", 12, weights)
    assert (whole.step, whole.reason) == (12, "finished")
    assert int(whole.state["critic"].step) == 12
    assert int(whole.state["generator"].step) == 3  # after 0, 5 and 10 steps
    assert not whole.state["critic"].ema and whole.state["generator"].ema

    # Each kind of step is compiled once, and the line shows what it has.
    for name in ("critic", "both"):
        assert caplog.text.count(f"compiling step '{name}'") == 1
    assert "step 1/12 critic/loss" in caplog.text and "generator/loss" in caplog.text
    lines = [
        json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    ]
    with_generator = [line["step"] for line in lines if "generator/loss" in line]
    assert with_generator == [1, 6, 11]
    assert [line["step"] for line in lines if "eval/distance" in line] == [4, 8, 12]

    # Stopped between two steps of the generator, and resumed.
    train(tmp_path / "parts", 7, weights)
    resumed = train(tmp_path / "parts", 12, weights, resume_with_changes=True)
    pairs = zip(jax.tree.leaves(whole.state), jax.tree.leaves(resumed.state), strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)


def test_networks_start_where_the_stage_says(tmp_path, weights):
    outcome = train(tmp_path, 0, weights)
    stage = make_stage(weights)
    student = stage.trained["generator"].load(weights / "student.safetensors")
    score = stage.frozen["real"].load(weights / "score.safetensors")
    for name, value in student.items():
        np.testing.assert_array_equal(outcome.state["generator"].params["generator"][name], value)
    for name, value in score.items():
        np.testing.assert_array_equal(outcome.state["critic"].params["critic"][name], value)
    assert list(stage.exported(outcome.state, outcome.frozen)) == ["generator"]
