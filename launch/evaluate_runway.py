"""Runway-Bench and the judge that it measures with: `launch.evaluate --bench runway` or `judge`."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chameleon_jax import files, places
from chameleon_jax.errors import need
from launch import cli
from launch.cli import UsageError

if TYPE_CHECKING:
    import numpy as np

    from chameleon_jax.evaluation.scenarios import Scenario, Truth
    from chameleon_jax.inference.mechanisms import SwitchConfig
    from chameleon_jax.inference.pipeline import Pipeline

    Stream = Callable[[Scenario, Truth], tuple[np.ndarray, tuple[int, ...]]]

FLAGS = ("judge", "world", "scenarios", "kind", "vae")  # of these benchmarks alone
OUT, WORLD, SCENARIOS = "out/runway_bench", "mirror", 128
MOST = 2666  # as `scenarios.MOST`; what draws them is not imported to read a command line
# Of each world, at 128x80.
JUDGES = {
    "mirror": "chameleon_jax/assets/runway_judge",
    "open": "chameleon_jax/assets/runway_judge_open",
}
TRUTH, UNCHANGED = "truth", "unchanged"
OF_VAE = "_vae"  # behind the name of a model: the column of its VAE
SHEET_EVERY = 6  # frames from one on a contact sheet to the next
# What the table calls the figures.
NAMES = {
    "first_type": "first garment, type, by the judge",
    "first_pattern": "first garment, pattern",
    "first_colours": "first garment, colours",
    "first_type_and_colours": "first garment, type and colours",
    "first_colour_distance": "first garment, CIELAB distance of the colours",
    "changed_type": "after a change, type",
    "changed_pattern": "after a change, pattern",
    "changed_colours": "after a change, colours",
    "changed_type_and_colours": "after a change, type and colours",
    "changed_colour_distance": "after a change, CIELAB distance of the colours",
    "wrong_frames": "after a change, frames in the garment before",
    "first_garment_psnr": "garment in the first frames, PSNR in dB",
    "person_cosine": "person, cosine to the picture in the end",
    "person_same": "person, the same one in the end",
    "background_psnr": "background in the end, PSNR in dB",
    "clothes_distance": "other clothes in the end, CIELAB distance",
    "garment_sharpness": "sharpness of the garment, end over start",
    "head_sharpness": "sharpness of the head, end over start",
    "prompt_arms": "prompt, arms and which hand",
    "prompt_side": "prompt, side of a shift",
    "jump_joints": "jump at a change, joints, over the usual change",
    "jump_place": "jump at a change, place of the head",
    "jump_background": "jump at a change, background",
    "jump_head": "jump at a change, head",
}


def define_flags(parser: cli.Parser) -> None:
    """The flags of these benchmarks alone."""
    parser.flag(
        "judge",
        "runway, judge: folder of the judge's weights; default of runway the one of the world, in"
        f" {' or '.join(JUDGES.values())}",
        metavar="DIR",
    )
    parser.flag(
        "world",
        f"runway, attention: of the scenarios, mirror or open; default {WORLD}",
        metavar="NAME",
    )
    parser.flag(
        "scenarios",
        f"runway: how many; default {SCENARIOS}, which are the benchmark, more give narrower"
        " intervals; attention: default 4",
        kind=cli.whole_number(1, MOST),
        metavar="N",
    )
    parser.flag(
        "kind",
        "runway: only scenarios of this kind: one, two, five, long, endless or prompt; may be"
        " repeated",
        repeated=True,
        metavar="KIND",
    )
    parser.switch(
        "vae",
        "runway: also the truth, encoded and decoded by the model's VAE and decoder, in a column"
        f" NAME{OF_VAE}: the most that a transformer can reach with them",
        default=None,
    )


def run(values: cli.Values, default_config: str) -> int:
    """The benchmarks. Returns the command's exit code.

    Raises:
      UserError: an input cannot be used.
    """
    if values.judge is None and values.bench == "judge":
        raise UsageError(
            "--bench judge needs --judge, the folder of the weights that are measured; what is"
            " found is written there"
        )
    need("numba", "runway")
    values.out = values.out or OUT
    values.world = values.world or WORLD
    values.judge = values.judge or judge_of(values.world)
    values.scenarios = values.scenarios or SCENARIOS
    places.check_writable(Path(values.out) / "table.md")
    cli.start_jax(values)
    return check_judge(values) if values.bench == "judge" else run_bench(values, default_config)


def judge_of(world: str) -> str:
    """The folder of the judge of a world.

    Raises:
      UsageError: there is none.
    """
    if world not in JUDGES:
        raise UsageError(f"--world is {world!r}; expected one of {', '.join(JUDGES)}")
    return JUDGES[world]


def check_judge(values: cli.Values) -> int:
    """Measure the judge, and write what was found beside it."""
    from chameleon_jax.data.rendered import RenderedSource
    from chameleon_jax.data.sources import open_sources
    from chameleon_jax.evaluation import judge, scenarios

    kinds = ("labels", "joints", "attributes")
    if values.data:
        source = open_sources(values.data, "validation", kinds)
    else:
        source = RenderedSource(
            judge.SEEDS, scenarios.SIZE, world=values.world, people=judge.PEOPLE, labels=kinds
        )
    size = tuple(int(side) for side in source.sizes[0])
    card = judge.check(values.judge, source, size, "" if values.data else values.world)
    print(json.dumps(card, indent=2))
    return 0


def load_model(values: cli.Values, default_config: str) -> tuple[Pipeline, SwitchConfig, int]:
    """The model of the command line, compiled; what a switch does; and the seed of the noise.

    Raises:
      UserError: the flags do not fit, or the weights cannot be used.
    """
    from chameleon_jax.inference.pipeline import Pipeline
    from launch import jobs

    config, mechanisms = jobs.read_stream(values, default_config)
    weights = values.weights or config.weights
    if weights == "random":
        pipeline = Pipeline.random(config, 0)
    else:
        pipeline = Pipeline.from_pretrained(weights, config)
    pipeline.compile()
    return pipeline, mechanisms, config.seed if values.seed is None else values.seed


def make_stream(pipeline: Pipeline, mechanisms: SwitchConfig, seed: int) -> Stream:
    """How a model streams a scenario."""
    import numpy as np

    def stream(scenario: Scenario, truth: Truth) -> tuple[np.ndarray, tuple[int, ...]]:
        session = pipeline.session(mechanisms)
        session.start(truth.reference, truth.pictures[0], scenario.prompts[0][1], seed)
        asked = list(zip(scenario.starts[1:], truth.pictures[1:], strict=True))
        prompts, switches, made = list(scenario.prompts[1:]), [], []
        while session.frames < scenario.frames:
            while asked and asked[0][0] <= session.frames:
                switches.append(session.switch_garment(asked.pop(0)[1]))
            while prompts and prompts[0][0] <= session.frames:
                session.switch_prompt(prompts.pop(0)[1])
            made.append(session.next_chunk())
        worn = tuple(switch.effective for switch in switches)
        return np.concatenate(made)[: scenario.frames], (0, *worn)

    return stream


def make_autoencoder(pipeline: Pipeline) -> Stream:
    """How a model's VAE and decoder show the truth of a scenario, each garment as a clip."""
    import jax
    import numpy as np
    from flax import nnx

    from chameleon_jax.data.images import to_model

    frames = pipeline.config.cache.block * pipeline.vae.config.temporal_factor  # of a chunk
    lead = pipeline.vae.config.temporal_factor - 1  # so many less are in the first one
    graph, params = nnx.split(pipeline.vae)

    def encode(params: nnx.State, pixels: jax.Array, state: Any, first: bool) -> Any:
        return nnx.merge(graph, params).encode_chunk(to_model(pixels)[None], state, first)

    encode = jax.jit(encode, static_argnames="first")

    def clip(video: np.ndarray) -> np.ndarray:
        room = -(len(video) + lead) % frames
        filled = np.concatenate([video, np.repeat(video[-1:], room, 0)])
        past, decoder, made = None, None, []
        for start in range(-lead, len(filled), frames):
            chunk = filled[max(start, 0) : start + frames]
            latents, past = encode(params, chunk, past, first=start < 0)
            shown, decoder = pipeline.media.decode(latents, decoder)
            made.append(np.array(shown))
        return np.concatenate(made)[: len(video)]

    def shown(scenario: Scenario, truth: Truth) -> tuple[np.ndarray, tuple[int, ...]]:
        parts = np.split(truth.video, scenario.starts[1:])
        return np.concatenate([clip(part) for part in parts]), scenario.starts

    return shown


def unchanged(scenario: Scenario) -> np.ndarray:
    """The truth, but in the garment of the start all the time."""
    from chameleon_jax.evaluation import scenarios

    first = dataclasses.replace(scenario, garments=scenario.garments[:1], starts=(0,))
    return scenarios.render(first).video


def run_bench(values: cli.Values, default_config: str) -> int:
    """Stream and measure the scenarios, and write the table."""
    from tqdm import tqdm

    from chameleon_jax.evaluation import runway_bench, scenarios
    from chameleon_jax.evaluation.judge import load_judge

    if values.name in (TRUTH, UNCHANGED) or values.name.endswith(OF_VAE):
        raise UsageError(f"--name {values.name}: stands for another column; choose another name")
    judge = load_judge(values.judge)
    known = judge.card.get("world", "")  # cards of one's own may be older than this entry
    if known not in ("", values.world):
        raise UsageError(
            f"--judge {values.judge}: was measured on the world {known}, not {values.world}; leave"
            " --judge out for the project's own, or train one, see configs/judge.py"
        )
    try:
        chosen = scenarios.scenarios(values.world, values.scenarios, values.kind or None)
    except ValueError as error:
        raise UsageError(f"--scenarios, --kind: {error}") from None
    out = Path(values.out) / values.world
    _check_recipes(out, values)
    columns = [TRUTH, UNCHANGED, *([values.name + OF_VAE] if values.vae else []), values.name]

    @functools.cache
    def streams() -> tuple[Stream, Stream]:
        """Only loaded if something is missing."""
        pipeline, mechanisms, seed = load_model(values, default_config)
        return make_autoencoder(pipeline), make_stream(pipeline, mechanisms, seed)

    with tqdm(total=len(chosen), unit=" scenarios", file=sys.stderr, dynamic_ncols=True) as bar:
        for scenario in chosen:
            results = {name: out / name / f"{scenario.name}.json" for name in columns}
            missing = [name for name, path in results.items() if not path.is_file()]
            if missing:
                truth = scenarios.render(scenario)
                person = judge(truth.reference[None], scenario.spec.slot)
            for name in missing:
                if name == TRUTH:
                    video, starts = truth.video, scenario.starts
                elif name == UNCHANGED:
                    video, starts = unchanged(scenario), scenario.starts
                else:
                    through_vae, stream = streams()
                    make = stream if name == values.name else through_vae
                    video, starts = make(scenario, truth)
                made = runway_bench.Made(video, judge(video, scenario.spec.slot), starts)
                figures = runway_bench.measure(scenario, truth, made, person, judge.card)
                save_sheet(results[name].with_suffix(".png"), truth, video)
                files.write_json(results[name], {"starts": list(starts), "figures": figures})
            bar.update()
    table = write_table(out, {scenario.name for scenario in chosen}, values.name)
    print(table)
    return 0


def _check_recipes(folder: Path, values: cli.Values) -> None:
    """Note what the figures in a folder are made with; figures made otherwise are not gone on with.

    Raises:
      UsageError: they were made with another judge, or those of this name with another model.
    """
    from chameleon_jax.data.sources import file_hash

    weights = values.weights or "that of the config"
    dit = places.find(values.weights) / "dit.safetensors" if values.weights else None
    model = {
        "weights": file_hash(dit) if dit is not None and dit.is_file() else weights,
        "config": values.config,
        "overrides": list(values.overrides),
        "switch": values.switch,
        "steps": values.steps,
        "seed": values.seed,
    }
    judge = {"judge": file_hash(places.find(values.judge) / "judge.safetensors")}
    for path, recipe, remedy in (
        (folder / "judge.recipe", judge, "choose another --out"),
        (folder / f"{values.name}.recipe", model, "choose another --name or --out"),
    ):
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(path, recipe)
            continue
        known = json.loads(path.read_text(encoding="utf-8"))
        other = [key for key in recipe if known.get(key) != recipe[key]]
        if other:
            raise UsageError(
                f"{folder}: the figures there were made with another {', '.join(other)}; {remedy}"
            )


def save_sheet(path: Path, truth: Truth, video: np.ndarray) -> None:
    """Person and garments, frames of the truth, and the same frames of the video."""
    from chameleon_jax.data.sheets import contact_sheet

    path.parent.mkdir(parents=True, exist_ok=True)
    shown = slice(None, None, SHEET_EVERY * max(1, len(video) // 165))
    rows = [[truth.reference, *truth.pictures], truth.video[shown], video[shown]]
    labels = ["person, garments", "truth", "made"]
    with files.replacing(path) as part:
        contact_sheet(rows, labels).save(part, "PNG")


def write_table(folder: Path, names: set[str], model: str) -> str:
    """The figures of all models in a folder over some scenarios: table.md, and a JSON each.

    Args:
      folder: of one world.
      names: scenarios that count; models that lack one of them are left out.
      model: comes last.
    """
    from chameleon_jax.evaluation import runway_bench

    columns = {}
    for place in sorted(_models(folder), key=lambda place: (place.name == model, place.name)):
        paths = [place / f"{name}.json" for name in sorted(names)]
        if not all(path.is_file() for path in paths):
            continue
        figures = [json.loads(path.read_text(encoding="utf-8"))["figures"] for path in paths]
        columns[place.name] = runway_bench.summarize(figures)
        files.write_json(
            folder / f"{place.name}.json",
            {key: dataclasses.asdict(one) for key, one in columns[place.name].items()},
        )
    ordered = {name: columns.pop(name) for name in (TRUTH, UNCHANGED) if name in columns}
    blind = runway_bench.blind(ordered[TRUTH], ordered[UNCHANGED]) if len(ordered) == 2 else []
    table = runway_bench.table(
        {
            name: {key: column[key] for key in NAMES if key in column and key not in blind}
            for name, column in (ordered | columns).items()
        },
        lambda name: NAMES[name],
    )
    if blind:
        table += (
            "\n\nLeft out, for this judge does not tell the truth from the garment before by them:"
            f" {'; '.join(NAMES[name] for name in blind)}."
        )
    text = (
        f"# Runway-Bench, world {folder.name}\n\n{len(names)} scenarios; means over scenarios with"
        f" 95 % intervals (bootstrap).\n\n{table}\n"
    )
    with files.replacing(folder / "table.md") as part:
        Path(part).write_text(text, encoding="utf-8")
    return table


def _models(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.is_dir())


if __name__ == "__main__":
    cli.library_module("evaluate_runway", "python -m launch.evaluate --judge DIR")
