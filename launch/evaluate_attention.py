"""Where a new chunk looks, before and after a change of garment: `launch.evaluate --bench
attention`.

Streams scenarios of Runway-Bench up to their first change, and makes the chunk behind it three
times: without a change, with the new garment in the cache alone (`refresh`), and with all
mechanisms of the paper (`full`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chameleon_jax import files, places
from chameleon_jax.errors import need
from launch import cli, evaluate_runway
from launch.cli import UsageError

if TYPE_CHECKING:
    import jax

    from chameleon_jax.attention.cache import KVCache
    from chameleon_jax.diffusion.rollout import Sampler
    from chameleon_jax.evaluation.attention_mass import AttentionMass
    from chameleon_jax.evaluation.scenarios import Scenario, Truth
    from chameleon_jax.inference.pipeline import Pipeline
    from chameleon_jax.inference.programs import StreamPrograms
    from chameleon_jax.models.dit import TextKV

FLAGS = ("world", "scenarios")  # of Runway-Bench, that it shares
OUT, SCENARIOS, KIND = "out/attention", 4, "two"
CHANGES = {"no change": None, "refresh": "refresh", "full": "full"}


class NotingPrograms:
    """The programs of a stream; of every chunk it is noted where it looks, before it is made.

    Args:
      programs: make the stream.
      sampler: theirs.
    """

    def __init__(self, programs: StreamPrograms, sampler: Sampler):
        from flax import nnx

        self.noted: list[AttentionMass] = []
        self._programs, self._sampler = programs, sampler
        self._dit = nnx.merge(programs.graphs["dit"], programs.weights["dit"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._programs, name)

    def chunk(
        self, cache: KVCache, text_kv: TextKV, seed: int, number: int, *rest: float
    ) -> tuple[jax.Array, KVCache]:
        """As `StreamPrograms.chunk`."""
        import jax
        import numpy as np

        from chameleon_jax.evaluation.attention_mass import chunk_attention
        from chameleon_jax.keys import inference_key

        key = inference_key(np.uint32(seed), "chunk_noise")
        key = jax.random.fold_in(key, np.int32(number))
        mass, _ = chunk_attention(self._dit, cache, text_kv, key, sampler=self._sampler)
        self.noted.append(mass)
        return self._programs.chunk(cache, text_kv, seed, number, *rest)


def run(values: cli.Values, default_config: str) -> int:
    """The command. Returns its exit code.

    Raises:
      UserError: an input cannot be used.
    """
    from tqdm import tqdm

    if values.switch is not None:
        raise UsageError("--switch is not for --bench attention, which compares; leave it out")
    need("numba", "runway")
    out = Path(values.out or OUT)
    places.check_writable(out / "table.md")
    cli.start_jax(values)

    from chameleon_jax.diffusion.rollout import make_sampler
    from chameleon_jax.evaluation import attention_mass, scenarios

    world, count = values.world or evaluate_runway.WORLD, values.scenarios or SCENARIOS
    of_kind = scenarios.scenarios(world, kinds=[KIND])
    if count > len(of_kind):
        raise UsageError(f"--scenarios {count}: there are {len(of_kind)} of them")
    pipeline, _, seed = evaluate_runway.load_model(values, default_config)
    noting = NotingPrograms(pipeline.stream, make_sampler(**pipeline.config.sampler))
    pipeline.stream = noting
    found: dict[str, list[AttentionMass]] = {}
    for scenario in tqdm(of_kind[:count], unit=" scenarios", file=sys.stderr, dynamic_ncols=True):
        rows = look(pipeline, noting, scenario, scenarios.render(scenario), seed)
        for name, mass in rows.items():
            found.setdefault(name, []).append(mass)
    means = {name: attention_mass.AttentionMass.mean(masses) for name, masses in found.items()}
    table = attention_mass.table(means)
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "attention.json", report(means, world, count, seed))
    files.write_text(out / "table.md", table + "\n")
    print(table)
    return 0


def look(
    pipeline: Pipeline, noting: NotingPrograms, scenario: Scenario, truth: Truth, seed: int
) -> dict[str, AttentionMass]:
    """Where the chunks of a scenario look, up to the one behind its first change.

    Args:
      pipeline: whose `stream` is `noting`.
      noting: notes.
      scenario: has a change.
      truth: its pictures.
      seed: of the noise.

    Returns:
      By name: chunks by their number; the last one by `CHANGES`, too.
    """
    from chameleon_jax.inference.mechanisms import SwitchConfig

    session, rows = pipeline.session(), {}
    session.start(truth.reference, truth.pictures[0], scenario.prompts[0][1], seed)
    while session.frames < scenario.starts[1]:
        session.next_chunk()
        rows[f"chunk {session.chunk}"] = noting.noted.pop()
    before = session.snapshot()
    for name, words in CHANGES.items():
        session.restore(before)
        if words is not None:
            session.mechanisms = SwitchConfig.parse(words)
            session.switch_garment(truth.pictures[1])
        session.next_chunk()
        rows[f"chunk {session.chunk}, {name}"] = noting.noted.pop()
    return rows


def report(means: Mapping[str, AttentionMass], world: str, count: int, seed: int) -> dict[str, Any]:
    """What is written as JSON: the parts, the chunks, and of what they are the mean."""
    from chameleon_jax.evaluation.attention_mass import PARTS

    return {
        "scenarios": {"world": world, "kind": KIND, "count": count, "seed": seed},
        "parts": list(PARTS),
        "chunks": {name: mass.to_json() for name, mass in means.items()},
    }
