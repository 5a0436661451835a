"""What a switch of garment, person or prompt does to a stream.

A garment switch is the KV cache rescheduling of FashionChameleon (arXiv 2605.15824, section 4.3),
three mechanisms of which each can be left out:

    refresh      new keys and values of reference and garment replace the old ones
    withdraw     the history is forgotten: the next chunk is the new sink, and a new clip starts in
                 the decoder
    disentangle  the new reference is the last frame shown, encoded alone as one image

Each change so made is a copy of a copy of the person, and faces wear out. A fourth mechanism, not
of the paper, is against that:

    anchor       behind the first chunk of the new clip, which goes on from the last frame, the
                 picture of the person is the reference again

That chunk is in the history, and the sink, of what follows, and shows a worn face. A setting makes
its word count less:

    history_noise  the chunk is remembered under noise of this level: the next ones take the pose
                   from it, and how the person looks from the picture

The new clip begins in the pose that was shown last, and yet not with the same wall and face to the
last bit. A setting, also not of the paper, hides the step:

    fade         small differences between both frames fade over the new chunk, see fade.py

Another way, of ours too, needs a model that was trained for it (`changes` in
configs/teacher_forcing.py), and copies no frame, for the reference is always the person's picture:

    carry        in the place of `disentangle`. Of the history the last chunk alone is remembered
                 again, under noise of level `carry_noise`: pose and motion go on from it, and what
                 is worn comes from the new picture. It is forgotten behind the first chunk in the
                 new garment, which is the new sink. No new clip starts in the decoder

For the ablations of section 5.3 something else can become the reference in its place:

    last_latent   the last latent frame as it was made, without decoding and encoding; unlike a
                  picture it stands for several pixel frames
    random_frame  one of all frames handed out so far, each as likely as any other, encoded as one
                  image
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from chameleon_jax.errors import UserError


class SwitchError(UserError):
    """No switch can do what was asked for. The message is one line."""


FULL = ("refresh", "withdraw", "disentangle")  # what the paper does
REFERENCES = ("disentangle", "last_latent", "random_frame")  # what may become the reference
MECHANISMS = (*FULL, "anchor", "carry", *REFERENCES[1:])
POSES = (*REFERENCES, "carry")  # what a new clip may take its pose from
LEVELS = ("history_noise", "carry_noise")


@dataclasses.dataclass(frozen=True)
class SwitchConfig:
    """What a garment or reference switch does; each can be turned off for an ablation.

    At most one of `disentangle`, `last_latent`, `random_frame` and `carry`; with none of them the
    reference stays what it is. All four act only where the switch brings no picture of a person.

    Raises:
      SwitchError: more than one of the four; or `anchor`, which writes into the cache, without
        `refresh`; or `carry` without `refresh` and `withdraw`; or a level of noise out of range.
    """

    # Write the new reference and garment into the cache; without it they stay unseen.
    refresh: bool = True
    withdraw: bool = True  # forget the history
    disentangle: bool = True  # the last frame shown becomes the reference
    # Leave out the first frame of the new clip, which repeats the last pose, unless its first chunk
    # has no other.
    drop_repeated_frame: bool = True
    last_latent: bool = False  # the last latent frame becomes the reference
    random_frame: bool = False  # any of the frames handed out so far becomes the reference
    anchor: bool = False  # a chunk later, the person's picture becomes the reference again
    # Level in [0, 1) of the noise under which the chunk before the anchor is remembered; without
    # `anchor` nothing.
    history_noise: float = 0.0
    carry: bool = False  # the last chunk is remembered under noise, and the reference stays
    carry_noise: float = 0.6  # its level, in [0, 1)
    # Of what the switch does not change no step is seen; only where the new clip repeats a pose.
    fade: bool = False

    def __post_init__(self):
        for name in LEVELS:
            if not 0 <= getattr(self, name) < 1:
                raise SwitchError(
                    f"a switch with {name}={getattr(self, name)}: expected a level of noise of"
                    " at least 0 and below 1"
                )
        chosen = [name for name in POSES if getattr(self, name)]
        if len(chosen) > 1:
            raise SwitchError(
                f"a switch with {' and '.join(chosen)}: each says what the new clip takes its pose"
                " from; choose one of them"
            )
        if self.carry and not (self.refresh and self.withdraw):
            raise SwitchError(
                "a switch with carry, and without refresh or withdraw: what is remembered under"
                " noise takes the place of the history; add both, or leave carry out"
            )
        if self.anchor and not self.refresh:
            raise SwitchError(
                "a switch with anchor and without refresh: the person's picture cannot come back"
                " if nothing is written into the cache; add refresh, or leave anchor out"
            )

    @classmethod
    def of(cls, config: ConfigDict) -> SwitchConfig:
        """What the group `switch` of a config says.

        Raises:
          SwitchError: it has a key or a value that is none, or no switch can do all of it.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        for name, value in config.switch.items():
            if name not in defaults:
                raise SwitchError(
                    f"config: switch.{name} is no setting; expected some of"
                    f" {', '.join(sorted(defaults))}"
                )
            is_flag = isinstance(defaults[name], bool)
            if isinstance(value, bool) != is_flag or not isinstance(value, int | float):
                expected = "True or False" if is_flag else "a number"
                raise SwitchError(f"config: switch.{name} is {value!r}; expected {expected}")
        return cls(**config.switch)

    @property
    def starts_clip(self) -> bool:
        """Whether a new clip starts in the decoder with a switch of the garment alone."""
        return self.withdraw and not self.carry

    @property
    def repeats(self) -> bool:
        """Whether the first frame after a switch repeats the pose that was shown last."""
        return self.refresh and self.withdraw and (self.disentangle or self.last_latent)

    @classmethod
    def parse(cls, text: str, like: SwitchConfig | None = None) -> SwitchConfig:
        """A comma-separated list of mechanisms.

        Its words are `refresh`, `withdraw`, `anchor` and one of `disentangle`, `last_latent`,
        `random_frame`, `carry`. `full` stands for `refresh,withdraw,disentangle`.

        Args:
          text: the list.
          like: has what no word says, `drop_repeated_frame`, `fade` and both levels of noise; None:
            their defaults.

        Raises:
          SwitchError: another word, a word twice, two of the last four, `anchor` without
            `refresh`, or `carry` without `refresh` and `withdraw`.
        """
        words = [word.strip() for word in text.split(",")]
        words = [each for word in words for each in (FULL if word == "full" else [word])]
        for place, word in enumerate(words):
            if word not in MECHANISMS:
                raise SwitchError(
                    f"unknown switch mechanism {word!r}; expected a list of full,"
                    f" {', '.join(MECHANISMS)}"
                )
            if word in words[:place]:
                raise SwitchError(f"switch mechanism {word!r} is named twice; name it once")
        return dataclasses.replace(like or cls(), **{word: word in words for word in MECHANISMS})
