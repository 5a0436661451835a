"""Cache policies: which frames of a stream are kept, in which slots, and at which positions.

A stream is made chunk by chunk: `block` latent frames at a time, behind `context` condition frames.
The cache has `frames` slots and can hold no more. A policy decides what happens to the rest. It is
a frozen value, static under jit, and a few pure functions over counters (its state, a pytree):

    state = policy.start()                   nothing is held but the context
    state = policy.open_chunk(state, cut)    before the first pass of a chunk
    policy.slots(state)                      slots of the chunk's frames       int32 [block]
    policy.length(state)                     how many slots it sees            int32 scalar
    policy.query_positions(state)            RoPE times of the chunk           int32 [block]
    policy.key_positions(state)              RoPE times of all slots           int32 [frames]
                                             or None: keys are cached rotated
    state = policy.close_chunk(state)        after the last pass

The streaming cache (cache.py) asks the policy where to write and what to read, teacher forcing
(masks.py) asks the same object which frames are still there (`views`), and the host asks it how
long a stream may become (`check_length`). Nothing else in the project knows a rule of forgetting.

What a chunk sees is always a prefix of the slots, so that attention needs no mask: everything once
the cache is full, the first slots before that. The order of the keys does not matter; positions are
in the RoPE, not in the slot.

    ring    context and sink stay, the oldest of the other frames are overwritten
    shots   for videos with cuts: the first chunk of the latest shot stays, too

Axes: f latent frames; slots, frames and chunks count from 0.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from chameleon_jax.attention.positions import MAX_POSITION, PositionError

State = Any  # counters of a policy: a pytree of small int32 arrays, one of which is `chunk`


class CachePolicy(Protocol):
    """What cache, teacher forcing and host ask of a policy; see the top of this file."""

    frames: int  # slots in all
    context: int  # condition frames in front, rewritten by a refresh
    block: int  # latent frames of a chunk

    @property
    def contiguous(self) -> bool:
        """Are the slots of a chunk always next to each other? Then it is written in one piece."""

    @property
    def rotates_on_write(self) -> bool:
        """Are keys cached rotated? Else they are rotated by `key_positions` when they are read."""

    def start(self) -> State: ...

    def open_chunk(self, state: State, cut: jax.Array | bool) -> State: ...

    def slots(self, state: State) -> jax.Array: ...

    def length(self, state: State) -> jax.Array: ...

    def held(self, state: State) -> jax.Array: ...

    def query_positions(self, state: State) -> jax.Array: ...

    def key_positions(self, state: State) -> jax.Array | None: ...

    def close_chunk(self, state: State) -> State: ...

    def check_length(self, chunk: int, cuts: int = 0) -> None: ...


@struct.dataclass
class RingState:
    """Counters of `Ring`."""

    chunk: jax.Array  # int32, number of the chunk in flight since the start or the last withdrawal


@dataclasses.dataclass(frozen=True)
class Ring:
    """Context and sink stay; of the frames behind them the latest `ring` stay.

    Attention sinks: Xiao et al., arXiv 2309.17453; for video FashionChameleon, arXiv 2605.15824,
    section 4.3. Slots, with the numbers of the paper, 2 + 3 + 18 = 23:

        | 0 reference | 1 garment | 2..4 sink: first chunk | 5..22 ring |

    Each new frame overwrites the oldest one of the ring. Which frames the chunks of a clip see, for
    `Ring(frames=11)`, with one chunk of sink and two of ring; a row is a chunk, a digit a frame:

        context  0    1    2    3    4
          11    111
          11    111  111
          11    111  111  111
          11    111  000  111  111
          11    111  000  000  111  111

    The ring need not be whole chunks. `Ring(frames=10)` forgets in the middle of a chunk, as the
    original does when its window is not whole chunks:

          11    111
          11    111  111
          11    111  011  111
          11    111  000  011  111

    Positions:

        absolute  keys are cached rotated by their frame number, as released; ends at position 1023
        relative  keys are cached unrotated and rotated by their age when read: what is left stands
                  without gaps from position 0 on, so that an endless stream stays within the
                  trained range. Until something is forgotten both agree.
    """

    frames: int = 23
    context: int = 2
    block: int = 3
    sink: int = 3  # frames behind the context that are never forgotten
    positions: str = "absolute"  # or "relative"

    def __post_init__(self):
        _check_layout(self)
        if self.positions not in ("absolute", "relative"):
            raise ValueError(
                f"cache.positions is {self.positions!r}; expected 'absolute' or 'relative'"
            )

    @property
    def ring(self) -> int:
        """Slots that are overwritten in turn."""
        return self.frames - self.context - self.sink

    @property
    def contiguous(self) -> bool:
        return self.sink % self.block == 0 and self.ring % self.block == 0

    @property
    def rotates_on_write(self) -> bool:
        return self.positions == "absolute"

    def start(self) -> RingState:
        return RingState(jnp.zeros((), jnp.int32))

    def open_chunk(self, state: RingState, cut: jax.Array | bool) -> RingState:
        """A ring makes no difference between shots."""
        del cut
        return state

    def slots(self, state: RingState) -> jax.Array:
        frame = self.block * state.chunk + jnp.arange(self.block)  # of the video
        behind_sink = self.sink + (frame - self.sink) % self.ring
        return self.context + jnp.where(frame < self.sink, frame, behind_sink)

    def length(self, state: RingState) -> jax.Array:
        return self._filled(state.chunk + 1)

    def held(self, state: RingState) -> jax.Array:
        """Slots in use between two chunks."""
        return self._filled(state.chunk)

    def _filled(self, chunks: jax.Array) -> jax.Array:
        return self.context + jnp.minimum(self.block * chunks, self.sink + self.ring)

    def query_positions(self, state: RingState) -> jax.Array:
        first = self.context + self.block * state.chunk
        if self.positions == "relative":
            first = self.length(state) - self.block  # the chunk is the newest of what is left
        return first + jnp.arange(self.block)

    def key_positions(self, state: RingState) -> jax.Array | None:
        """Rank of each slot's frame among the frames that are left; relative positions only.

        Slots that hold nothing yet get some position in range; they are not read.
        """
        if self.rotates_on_write:
            return None
        last = self.block * (state.chunk + 1) - 1  # newest frame of the video
        age = (last - self.sink - jnp.arange(self.ring)) % self.ring
        forgotten = jnp.maximum(last + 1 - self.sink - self.ring, 0)
        rank = jnp.maximum(last - age - forgotten, 0)
        kept = jnp.arange(self.context + self.sink)  # context and sink stand in front
        return jnp.concatenate([kept, self.context + rank])

    def close_chunk(self, state: RingState) -> RingState:
        return RingState(state.chunk + 1)

    def check_length(self, chunk: int, cuts: int = 0) -> None:
        """Refuse a chunk whose positions are beyond the RoPE table.

        For the host: inside a jitted program the number of the chunk is traced, and a position
        that is too large would be read as 1023.

        Args:
          chunk: number of the chunk about to be made, since the start or the last withdrawal.
          cuts: before it; a ring makes no difference between shots.

        Raises:
          PositionError: absolute positions, and the chunk is beyond (1024 - context) / block.
        """
        del cuts
        limit = (MAX_POSITION - self.context) // self.block
        if self.rotates_on_write and chunk >= limit:
            raise PositionError(
                f"chunk {chunk} of the stream is beyond the {limit} that absolute positions reach;"
                " set cache.positions='relative', or let a garment switch withdraw the history"
            )


@struct.dataclass
class ShotState:
    """Counters of `Shots`; int32.

    Attributes:
      chunk: number of the chunk in flight, since the start.
      shot: number of its shot, from 0.
      opening: the chunk that opened that shot; -1 in the first shot, which has the sink.
      pinned: the chunk that is kept for it; -1 for none. While the opening chunk is in flight,
        still that of the shot before.
      held: which chunk each place has, [chunks]. A place that is still empty has the number of the
        chunk that it waits for.
    """

    chunk: jax.Array
    shot: jax.Array
    opening: jax.Array
    pinned: jax.Array
    held: jax.Array


@dataclasses.dataclass(frozen=True)
class Shots:
    """A ring for videos of several shots (LongLive-2.0, arXiv 2605.18739).

    The chunk that opened the latest shot stays until the next shot has been opened; the other
    places of the ring are taken in turn, oldest first. Every shot stands `shot_offset` positions
    further on than the frames before it; the keys of the shots before keep theirs.

    Which frames the chunks see, for `Shots(frames=8, context=0, block=2, sink=2)` and a cut before
    chunk 4; a row is a chunk:

         0   1   2   3   4   5   6   7
        11
        11  11
        11  11  11
        11  11  11  11
        11  00  11  11  11
        11  00  00  11  11  11
        11  00  00  00  11  11  11
        11  00  00  00  11  00  11  11
    """

    frames: int = 32
    context: int = 0
    block: int = 8
    sink: int = 8  # frames behind the context that are never forgotten: whole chunks
    pin: bool = True  # keep the chunk that opened the latest shot
    shot_offset: int = 8  # positions, in latent frames, that are left out between two shots

    contiguous = True
    rotates_on_write = True

    def __post_init__(self):
        _check_layout(self)
        if self.shot_offset < 0:
            raise ValueError(
                f"cache.shot_offset is {self.shot_offset}; expected 0 or more latent frames"
            )
        if self.sink % self.block or (self.frames - self.context) % self.block:
            raise ValueError(
                f"cache: sink {self.sink} and frames - context = {self.frames - self.context} must"
                f" be whole chunks of {self.block} frames"
            )
        if self.pin and self.chunks - self.sink_chunks < 2:
            raise ValueError(
                f"cache.frames={self.frames} leaves one chunk for the ring; cache.pin needs two,"
                " the pinned one and the one in flight"
            )

    @property
    def chunks(self) -> int:
        """Places for chunks."""
        return (self.frames - self.context) // self.block

    @property
    def sink_chunks(self) -> int:
        return self.sink // self.block

    def start(self) -> ShotState:
        # Four arrays, not one four times: all of them are donated.
        chunk, shot = (jnp.zeros((), jnp.int32) for _ in range(2))
        opening, pinned = (jnp.full((), -1, jnp.int32) for _ in range(2))
        return ShotState(chunk, shot, opening, pinned, jnp.arange(self.chunks, dtype=jnp.int32))

    def open_chunk(self, state: ShotState, cut: jax.Array | bool) -> ShotState:
        """If `cut`, the chunk is the first of a new shot. The very first chunk opens none."""
        cut = jnp.asarray(cut) & (state.chunk > 0)
        opening = jnp.where(cut, state.chunk, state.opening)
        return state.replace(shot=state.shot + cut, opening=opening)

    def _place(self, state: ShotState) -> jax.Array:
        """The next empty place, then that of the oldest chunk that is not kept."""
        kept = state.held < self.sink_chunks
        if self.pin:
            kept |= state.held == state.pinned
        oldest = jnp.argmin(jnp.where(kept, jnp.iinfo(jnp.int32).max, state.held))
        return jnp.where(state.chunk < self.chunks, state.chunk, oldest)

    def slots(self, state: ShotState) -> jax.Array:
        return self.context + self.block * self._place(state) + jnp.arange(self.block)

    def length(self, state: ShotState) -> jax.Array:
        return self.context + self.block * jnp.minimum(state.chunk + 1, self.chunks)

    def held(self, state: ShotState) -> jax.Array:
        """Slots in use between two chunks."""
        return self.context + self.block * jnp.minimum(state.chunk, self.chunks)

    def query_positions(self, state: ShotState) -> jax.Array:
        first = self.context + self.block * state.chunk + self.shot_offset * state.shot
        return first + jnp.arange(self.block)

    def key_positions(self, state: ShotState) -> None:
        """Keys are cached rotated: neither a pinned chunk nor an offset keeps its place by age."""
        return None

    def close_chunk(self, state: ShotState) -> ShotState:
        """The chunk that opened a shot is pinned from now on."""
        held = state.held.at[self._place(state)].set(state.chunk)
        return state.replace(chunk=state.chunk + 1, pinned=state.opening, held=held)

    def check_length(self, chunk: int, cuts: int = 0) -> None:
        """Refuse a chunk whose positions are beyond the RoPE table; see `Ring.check_length`.

        Raises:
          PositionError: beyond (1024 - context - shot_offset * cuts) / block chunks.
        """
        limit = max(0, MAX_POSITION - self.context - self.shot_offset * cuts) // self.block
        if chunk >= limit:
            raise PositionError(
                f"chunk {chunk} of the video, in shot {cuts}, is beyond the {limit} that absolute"
                " positions reach there; make fewer chunks or fewer shots"
            )


POLICIES: dict[str, type[Ring] | type[Shots]] = {"ring": Ring, "shots": Shots}


def make_policy(policy: str = "ring", **settings: Any) -> CachePolicy:
    """A policy from the group `cache` of a config: `make_policy(**config.cache)`.

    Args:
      policy: a name of `POLICIES`.
      settings: fields of that class.

    Raises:
      ValueError: an unknown name or setting, or a layout that cannot be.
    """
    if policy not in POLICIES:
        raise ValueError(f"cache.policy is {policy!r}; expected one of {', '.join(POLICIES)}")
    known = [field.name for field in dataclasses.fields(POLICIES[policy])]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ValueError(
            f"cache.{unknown[0]}: the policy {policy!r} has no such setting; it has"
            f" {', '.join(known)}"
        )
    return POLICIES[policy](**settings)


def _check_layout(policy: Ring | Shots) -> None:
    """Numbers that any policy of context, sink and ring must have."""
    for name in ("frames", "context", "block", "sink"):
        value = getattr(policy, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"cache.{name} is {value!r}; expected a whole number of latent frames")
    if min(policy.context, policy.sink) < 0 or policy.block < 1:
        raise ValueError(
            f"cache: context {policy.context}, sink {policy.sink}, block {policy.block}; expected"
            " no negative number, and at least 1 frame in a block"
        )
    rest = policy.frames - policy.context - policy.sink
    if rest < policy.block:
        raise ValueError(
            f"cache.frames={policy.frames} leaves {rest} frames behind context and sink; expected"
            f" room for a chunk of {policy.block}"
        )


class View(NamedTuple):
    """What one chunk of a clip sees, in the order of the clip; its own frames come last."""

    frames: np.ndarray  # numbers of the latent frames, context included, [s]
    positions: np.ndarray  # their RoPE times, [s]


@functools.lru_cache(64)
def views(policy: CachePolicy, chunks: int, cuts: tuple[int, ...] = ()) -> tuple[View, ...]:
    """What each chunk of a clip sees, found by walking the policy over the clip.

    Args:
      policy: of the stream.
      chunks: of the clip.
      cuts: chunks that open a new shot.
    """
    context, block = policy.context, policy.block
    frame_of, position_of = (np.full(policy.frames, -1) for _ in range(2))  # by slot
    frame_of[:context] = position_of[:context] = np.arange(context)
    found = []
    with jax.ensure_compile_time_eval():  # on numbers, also while a program is traced
        state = policy.start()
        for chunk in range(chunks):
            state = policy.open_chunk(state, chunk in cuts)
            slots = np.asarray(policy.slots(state))
            frame_of[slots] = context + block * chunk + np.arange(block)
            position_of[slots] = np.asarray(policy.query_positions(state))
            by_age = policy.key_positions(state)
            positions = position_of if by_age is None else np.asarray(by_age)
            seen = np.arange(int(policy.length(state)))
            seen = seen[np.argsort(frame_of[seen])]
            found.append(View(frame_of[seen], positions[seen]))
            state = policy.close_chunk(state)
    return tuple(found)


def keep_everything(context: int, block: int, chunks: int) -> Ring:
    """The policy with room for a whole clip: nothing is forgotten."""
    return Ring(frames=context + block * chunks, context=context, block=block, sink=0)
