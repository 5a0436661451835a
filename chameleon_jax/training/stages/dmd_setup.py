"""What the config of distillation says: its networks, the kinds of roll-out, the sampler; checked.

A roll-out can be longer than the clips of the data, and garment switches can come before it
(`rollout.kinds`): what is trained is then what is streamed.

    (0, 0)   from the start of a stream, as published
    (n, 0)   n chunks first; the last frames of the stream are trained
    (n, k)   k times: n chunks, then a switch (refresh, withdraw, disentangle) to the garment of
             another sample of the batch; then trained from the new start on

With `rollout.anchor` the person's own picture comes back behind the first chunk after a switch, as
in a stream with that mechanism (inference/mechanisms.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from chameleon_jax.config import ConfigError, flatten
from chameleon_jax.diffusion.rollout import OneStepSampler, make_sampler
from chameleon_jax.models.build import read_sizes
from chameleon_jax.models.discriminator import Discriminator, DiscriminatorConfig
from chameleon_jax.training.networks import Network, build_network, weights_file
from chameleon_jax.training.stages import common
from chameleon_jax.training.stages.rewards import Reward
from chameleon_jax.training.tuning import Tuned, fixed_name, stored, tune


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of roll-out, see the top of this file."""

    before: int  # chunks in front
    switches: int  # each with so many chunks in front of it

    @property
    def suffix(self) -> str:
        """What tells its step from that of the plain kind."""
        return f" {self.before}+{self.switches}" if self.before else ""


def networks(config: ConfigDict, reward: Reward | None) -> common.Networks:
    """Student and critic, trained as `tune` says; teacher, VAE, text encoders, reward, frozen.

    With stored text states (`data.text`) there is no text encoder. A critic that is a LoRA lies on
    top of the teacher, which is there once.

    Raises:
      ConfigError: weights are not named, or settings do not go together.
    """
    score = "score" if "score" in config.model else "dit"
    modules = {
        "generator": tune("dit", config),
        "critic": tune(score, config),
        "real": stored(Tuned(build_network(score, config, frozen=True))),
        "vae": Tuned(build_network("vae", config, frozen=True)),
    }
    # Where each one's weights are: the key that names them, and the file.
    sources = {
        "generator": ("init_from", "dit"),
        "critic": ("weights.score", "dit"),
        "real": ("weights.score", "dit"),
        "vae": ("weights.vae", "vae"),
    }
    if config.data.text:
        common.check_stored_text(config)
        if config.weights.score_text:
            raise ConfigError(
                "data.text names the states of one text encoder, and weights.score_text another"
                " encoder; set one of them only"
            )
    else:
        for name in ("text", *(("score_text",) if config.weights.score_text else ())):
            sizes = name if name in config.model else "text"
            if config.model[sizes].length != config.model.text.length:
                raise ConfigError(
                    f"the text encoder of weights.{name} reads {config.model[sizes].length} tokens,"
                    f" that of weights.text {config.model.text.length}; expected as many"
                )
            modules[name] = Tuned(build_network(sizes, config, frozen=True))
            sources[name] = (f"weights.{name}", "text")
    for name, network in reward.networks.items() if reward else ():
        modules[name] = Tuned(network)
        sources[name] = (f"weights.{name}", name)
    trained = ["generator", "critic"]
    if config.gan.layers:
        modules["heads"] = Tuned(_heads(config, score))
        trained.append("heads")
    named = flatten(config)
    missing = [key for key, _ in sources.values() if not named[key]]
    if missing:
        raise ConfigError(
            f"{', '.join(dict.fromkeys(missing))}: not set; distillation starts from the student of"
            " teacher forcing (init_from), the teacher (weights.score), its VAE and text encoder"
        )
    files = {name: weights_file(named[key], file) for name, (key, file) in sources.items()}
    return _assembled(config, modules, trained, files)


def _assembled(
    config: ConfigDict,
    modules: Mapping[str, Tuned],
    trained: Sequence[str],
    files: Mapping[str, Path],
) -> common.Networks:
    frozen = {name: net.changing for name, net in modules.items() if name not in trained}
    weights = {name: path for name, path in files.items() if name in frozen}
    for name in trained:
        tuned = modules[name]
        if tuned.fixed is not None and not shares_teacher(name, tuned):
            frozen[fixed_name(name)], weights[fixed_name(name)] = tuned.fixed, files[name]
        if name in files and not tuned.added:
            weights[name] = files[name]
    if config.data.text and config.weights.text:
        weights["text"] = weights_file(config.weights.text, "text")
    changing = {name: modules[name].changing for name in trained}
    return common.Networks(changing, frozen, weights, modules)


def shares_teacher(name: str, tuned: Tuned) -> bool:
    """Is this the critic on top of the teacher's own weights?"""
    return name == "critic" and tuned.added


def _heads(config: ConfigDict, score: str) -> Network:
    sizes = read_sizes(score, config.model[score].to_dict())
    outside = [layer for layer in config.gan.layers if not 0 <= layer < sizes.layers]
    if outside:
        raise ConfigError(
            f"gan.layers has {outside}; expected numbers from 0 to {sizes.layers - 1}, layers of"
            " the critic"
        )
    if config.scores.causal or config.train.scan_layers:
        raise ConfigError(
            "gan.layers needs scores.causal=false and train.scan_layers=false: the heads look into"
            " single layers of a bidirectional critic"
        )
    heads = DiscriminatorConfig(sizes.width, len(config.gan.layers), config.gan.hidden)
    return Network(lambda rngs: Discriminator(heads, rngs=rngs))


def read_kinds(config: ConfigDict) -> tuple[Kind, ...]:
    """The kinds of roll-out that are taken in turn.

    Raises:
      ConfigError: not pairs of counts, a switch without anything in front of it, or an anchor that
        nothing can learn from; or noise on its chunk, and no anchor.
    """
    for entry in config.rollout.kinds:
        whole = isinstance(entry, (tuple, list)) and len(entry) == 2
        if not whole or not all(type(count) is int and count >= 0 for count in entry):
            raise ConfigError(
                f"rollout.kinds has the entry {entry!r}; expected (chunks in front, switches),"
                " whole numbers of at least 0"
            )
    kinds = tuple(Kind(*entry) for entry in config.rollout.kinds)
    if not kinds or len(set(kinds)) != len(kinds):
        raise ConfigError(f"rollout.kinds is {config.rollout.kinds}; expected different kinds")
    for kind in kinds:
        if kind.switches and not kind.before:
            raise ConfigError(
                f"rollout.kinds has {(kind.before, kind.switches)}; a switch needs at least one"
                " chunk in front of it, whose last frame becomes the reference"
            )
    smallest = min((clips for _, clips in config.data.lengths), default=config.data.batch)
    if any(kind.switches for kind in kinds) and smallest < 2:
        raise ConfigError(
            "rollout.kinds has switches, and a batch has one clip: the new garment is that of"
            " another one; set data.batch to 2 or more"
        )
    if config.rollout.anchor:
        _check_anchor(config, kinds)
    elif config.rollout.history_noise:
        raise ConfigError(
            f"rollout.history_noise is {config.rollout.history_noise}, and rollout.anchor is not"
            " set; set it, or no noise: it is on the chunk before the person's picture comes back"
        )
    return kinds


def _check_anchor(config: ConfigDict, kinds: Sequence[Kind]) -> None:
    if not any(kind.switches for kind in kinds):
        raise ConfigError(
            f"rollout.anchor is set, and rollout.kinds is {config.rollout.kinds}; expected one with"
            " a switch, such as (1, 1), behind which the person's picture can come back"
        )
    if not config.scores.causal:
        raise ConfigError(
            "rollout.anchor needs scores.causal=True: a bidirectional score knows one picture of"
            " the person for a whole clip, in the pose that the clip begins with"
        )


def shares_exit(config: ConfigDict) -> bool:
    """Is the exit step of a roll-out one for all chunks?

    Raises:
      ConfigError: neither "shared" nor "chunk".
    """
    if config.rollout.exit not in ("shared", "chunk"):
        raise ConfigError(
            f"rollout.exit is {config.rollout.exit!r}; expected shared (one draw for all chunks) or"
            " chunk (one for each)"
        )
    return config.rollout.exit == "shared"


def read_sampler(config: ConfigDict) -> OneStepSampler:
    """The sampler of the stream to train for.

    Raises:
      ConfigError: it is none of few steps with fresh noise between them.
    """
    try:
        sampler = make_sampler(**config.streaming.sampler)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(sampler, OneStepSampler) or not sampler.fresh_noise:
        raise ConfigError(
            f"streaming.sampler.name is {config.streaming.sampler.name!r}; distillation trains the"
            " sampler 'few_step'"
        )
    if sampler.guidance != 1:
        raise ConfigError(
            f"streaming.sampler.guidance is {sampler.guidance}; expected 1: the student learns the"
            " guidance of its teacher"
        )
    return sampler
