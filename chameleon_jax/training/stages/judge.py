"""The judge's stage: a network that reads from frames what rendered clips are labelled with.

A batch holds single frames, `video` uint8 [b, 1, h, w, 3], with all their labels; some of them are
blurred or noisy, since what the judge is for is never as crisp as a render. The embedding of a
person is learnt by telling many people apart, each seen in several clips, clothes and lights
(`prepare runway --people`), with weights of length 1 as in NormFace (arXiv 1704.06369); those
weights are thrown away.

Axes: b frames, h w pixels, c channels, j joints.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from ml_collections import ConfigDict

from chameleon_jax.config import ConfigError
from chameleon_jax.data.images import to_model
from chameleon_jax.data.labels import KINDS, NAMES, PATTERNS, SLOT_OF, SLOTS, TYPES
from chameleon_jax.data.loader import LoaderConfig
from chameleon_jax.data.sheets import contact_sheet
from chameleon_jax.data.sources import Source
from chameleon_jax.models.judge import Seen
from chameleon_jax.sharding import to_host
from chameleon_jax.training.feed import Feed, HostBatch, Part
from chameleon_jax.training.networks import Network, build_network, weights_file
from chameleon_jax.training.stage import Shown, Stage, simple_stage
from chameleon_jax.training.stages import common
from chameleon_jax.training.state import Batch, Metrics, ParamTree

PEOPLE = "people"
SCALE = 12.0  # of the cosines that tell people apart
# Colours of the labels in a preview.
TINTS = np.array([(40, 40, 40), (230, 120, 40), (80, 160, 240), (240, 200, 170), (110, 200, 110)])


class People(nnx.Module):
    """A direction for each person that is told apart.

    They begin short: only where a step of the optimiser is large beside them do they turn, and
    people who look alike come to lie side by side. Long ones stay random, and hundreds of random
    directions are more than the network can learn by heart.
    """

    def __init__(self, count: int, embedding: int, *, rngs: nnx.Rngs):
        first = 0.02 * jax.random.normal(rngs.params(), (count, embedding))
        self.directions = nnx.Param(first)

    def __call__(self, embedding_bc: jax.Array) -> jax.Array:
        """Logits [b, people] of unit vectors."""
        directions = self.directions.get_value()
        directions /= jnp.linalg.norm(directions, axis=-1, keepdims=True)
        return SCALE * embedding_bc @ directions.T


def make_stage(config: ConfigDict) -> Stage:
    """The judge's stage; see configs/judge.py for the config.

    Raises:
      ConfigError: the data are read without labels, or the network has other numbers of them.
    """
    missing = [
        name for name in ("labels", "joints", "attributes") if name not in config.data.labels
    ]
    if missing:
        raise ConfigError(f"data.labels lacks {', '.join(missing)}; the judge learns from them")
    sizes = config.model.judge
    wanted = {"labels": len(NAMES), "types": len(TYPES), "patterns": len(PATTERNS)}
    wanted |= {"slots": len(SLOTS)} if sizes.get("slots") else {}
    other = {name: count for name, count in wanted.items() if sizes.get(name, count) != count}
    if other:
        raise ConfigError(f"model.judge: {other} are the numbers of labels, and no choice")
    network = build_network("judge", config)
    people = Network(
        lambda rngs: People(config.people.count, network.abstract.config.embedding, rngs=rngs)
    )

    def loss(
        params: ParamTree, frozen: ParamTree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        del frozen
        frames = spoiled(to_model(batch["video"][:, 0]), key, config.loss.spoiled)
        seen = network.bind(params["judge"])(frames, slots_of(batch))
        logits = people.bind(params[PEOPLE])(seen.person)
        number = ((batch["attributes"][:, 0] - config.people.first) // config.people.each).astype(
            jnp.int32
        )
        return judge_loss(seen, logits, number, batch, config.loss)

    @jax.jit
    def read(params: ParamTree, batch: Batch) -> jax.Array:
        seen = network.bind(params["judge"])(to_model(batch["video"][:, 0]), slots_of(batch))
        return seen.labels.argmax(-1)

    def preview(params: ParamTree, frozen: ParamTree, batch: Batch, key: jax.Array) -> Shown:
        del frozen, key
        found = to_host(read(params, batch)).repeat(2, axis=1).repeat(2, axis=2)
        shown = [batch["video"][:, 0], TINTS[batch["labels"][:, 0]], TINTS[found]]
        return np.asarray(contact_sheet([np.uint8(to_host(row)) for row in shown])), {}

    def whole(params: ParamTree, frozen: ParamTree) -> ParamTree:
        del frozen
        return {"judge": params["judge"]}

    return simple_stage(
        config,
        "judge",
        trained={"judge": network, PEOPLE: people},
        loss=loss,
        preview=preview,
        batches=functools.partial(batches, config),
        eval_batches=functools.partial(eval_batches, config),
        whole=whole,
        weights={"judge": weights_file(config.init_from, "judge")} if config.init_from else {},
    )


def slots_of(batch: Batch) -> jax.Array:
    """Where the garments of a batch are worn, [b]: numbers of `labels.SLOTS`."""
    return jnp.asarray(SLOT_OF)[batch["attributes"][:, 1].astype(jnp.int32)]


def spoiled(x_bhwc: jax.Array, key: jax.Array, share: float) -> jax.Array:
    """Frames in [-1, 1] of which a share is blurred, and a share noisy, each by a random amount."""
    key_amounts, key_noise, key_which = jax.random.split(key, 3)
    amounts = jax.random.uniform(key_amounts, (2, len(x_bhwc), 1, 1, 1))
    chosen = jax.random.uniform(key_which, amounts.shape) < share
    amounts = amounts * chosen
    b, h, w, c = x_bhwc.shape
    coarse = jax.image.resize(x_bhwc, (b, h // 3, w // 3, c), "linear")
    blurred = jax.image.resize(coarse, x_bhwc.shape, "linear")
    x = x_bhwc + amounts[0] * (blurred - x_bhwc)
    return x + 0.15 * amounts[1] * jax.random.normal(key_noise, x.shape)


def judge_loss(
    seen: Seen, people_logits: jax.Array, person: jax.Array, batch: Batch, weights: ConfigDict
) -> tuple[jax.Array, Metrics]:
    """Sum of the parts, and how often each is right.

    Args:
      seen: what the judge said of the frames.
      people_logits: [b, people].
      person: which of these people it is, [b]; a number beyond them (held-out people) counts not.
      batch: with `labels` [b, 1, h, w], `joints` [b, 1, j, 2] and `attributes` [b, 9].
      weights: of the parts.
    """
    shown = jax.nn.one_hot(batch["labels"][:, 0], len(NAMES))
    shares = rearrange(shown, "b (h p) (w q) c -> b h w (p q) c", p=2, q=2).mean(3)
    attributes = batch["attributes"]
    type_, pattern = (attributes[:, i].astype(jnp.int32) for i in (1, 2))
    joints = batch["joints"][:, 0].astype(jnp.float32)
    inside = ((joints > 0) & (joints < 1)).all(-1)
    off = jnp.sqrt(jnp.square(seen.joints - joints).sum(-1) + 1e-8)
    known = (person >= 0) & (person < people_logits.shape[-1])
    among = jnp.clip(person, 0, people_logits.shape[-1] - 1)
    parts = {
        "labels": -(shares * jax.nn.log_softmax(seen.labels)).sum(-1).mean(),
        "joints": _mean_of(off, inside),
        "type": cross_entropy(seen.type, type_).mean(),
        "pattern": cross_entropy(seen.pattern, pattern).mean(),
        "person": _mean_of(cross_entropy(people_logits, among), known),
    }
    total = sum(weights[name] * part for name, part in parts.items())
    right = {
        "labels_right": (seen.labels.argmax(-1) == shares.argmax(-1)).mean(),
        "joints_off": parts["joints"],
        "type_right": (seen.type.argmax(-1) == type_).mean(),
        "pattern_right": (seen.pattern.argmax(-1) == pattern).mean(),
        "person_right": _mean_of(people_logits.argmax(-1) == among, known),
    }
    return total, {f"judge/{name}": value for name, value in right.items()}


def cross_entropy(logits: jax.Array, number: jax.Array) -> jax.Array:
    """-log of the share that each row gives to the right number, [b]."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), number[:, None], axis=-1)[:, 0]


def _mean_of(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of the values that count; 0 if none does."""
    return (values * mask).sum() / jnp.maximum(mask.sum(), 1)


def batches(config: ConfigDict, source: Source) -> Feed:
    """Random frames of clips."""
    return Feed(source, [_part(config, random_start=True)])


def eval_batches(config: ConfigDict, source: Source) -> Feed:
    """First frames of clips, the same in every run."""
    return Feed(source, [common.held_out(_part(config, random_start=False))])


def _part(config: ConfigDict, *, random_start: bool) -> Part:
    def transform(raw: dict[str, Any], rngs: Sequence[np.random.Generator]) -> HostBatch:
        del rngs
        return {name: raw[name] for name in ("video", *KINDS) if name in raw}

    data = config.data
    loader = LoaderConfig(
        batch=data.batch,
        frames=1,
        buckets=((config.video.height, config.video.width),),
        captions="dynamic",
        dropout=0.0,
        random_start=random_start,
        seed=config.seed,
        threads=data.threads,
        prefetch=data.prefetch,
        workers=data.workers,
    )
    return Part(loader, transform)
