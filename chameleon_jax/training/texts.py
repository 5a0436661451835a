"""Prompts as a training step takes them: token ids for the text encoder, or its stored states.

A batch holds either `ids` and `mask` [b, l], or `text` [b, l, m]: the states that `prepare text`
has computed once (see `data.text_states`), with which no encoder is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

from ml_collections import ConfigDict

from chameleon_jax import places
from chameleon_jax.config import ConfigError
from chameleon_jax.data.sources import file_hash
from chameleon_jax.data.text_states import TextStates
from chameleon_jax.data.tokenizer import Tokenizer
from chameleon_jax.training.feed import HostBatch
from chameleon_jax.training.networks import weights_file


class Texts:
    """Makes inputs of prompts, as a config says: of states if `data.text` names a folder of them.

    Args:
      config: of a diffusion stage.

    Attributes:
      states: the stored states; None if prompts are tokenised.

    Raises:
      ConfigError: no usable tokenizer; states of another encoder, or without the empty prompt.
      TokenizerError, TextError: the tokenizer or the states cannot be read.
    """

    def __init__(self, config: ConfigDict):
        self.states = _open_states(config) if config.data.text else None
        self._tokenizer = None if self.states else _open_tokenizer(config)

    def __call__(self, prompts: Sequence[str]) -> HostBatch:
        """`text`, or `ids` and `mask`, of some prompts.

        Raises:
          TextError: the states of one are not stored.
        """
        if self.states is not None:
            return {"text": self.states.batch(prompts)}
        ids, mask = self._tokenizer(prompts)
        return {"ids": ids, "mask": mask}


def check_encoder(config: ConfigDict) -> None:
    """Compare stored states with the weights and the tokenizer that a config names, if it does.

    Raises:
      ConfigError: they were made with others.
      SourceError: a file cannot be read.
    """
    states = TextStates(config.data.text)
    named = {"data.tokenizer": (config.data.tokenizer, states.tokenizer)}
    if config.weights.text:
        named["weights.text"] = (weights_file(config.weights.text, "text"), states.weights)
    for key, (path, made_with) in named.items():
        if path and (found := file_hash(places.find(path))) != made_with:
            raise ConfigError(
                f"data.text: the states in {config.data.text} were made with another file than"
                f" {key} {path} (hash {made_with}, not {found}); make them anew, or name the same"
                " file"
            )


def _open_states(config: ConfigDict) -> TextStates:
    states, sizes = TextStates(config.data.text), config.model.text
    for name in ("width", "length"):
        if getattr(states, name) != sizes[name]:
            raise ConfigError(
                f"data.text: the states in {config.data.text} have {name} {getattr(states, name)},"
                f" model.text.{name} is {sizes[name]}; expected those of one encoder"
            )
    if "" not in states:
        raise ConfigError(
            f"data.text: {config.data.text} has no states of the empty prompt; make it with"
            " `prepare text`"
        )
    return states


def _open_tokenizer(config: ConfigDict) -> Tokenizer:
    path = config.data.tokenizer
    if not path:
        raise ConfigError("data.tokenizer is not set; give the tokenizer.json of the text encoder")
    tokenizer = Tokenizer.from_file(path, config.model.text.length)
    if tokenizer.vocab > config.model.text.vocab:
        raise ConfigError(
            f"{path} has {tokenizer.vocab} pieces, model.text.vocab is {config.model.text.vocab}"
        )
    return tokenizer
