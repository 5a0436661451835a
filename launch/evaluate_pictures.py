"""Benchmarks of pictures and prompts, such as HGC-Bench: `launch.evaluate --bench hgc`.

Three stages. With several of them, or with several metrics, each runs in a process of its own: the
same command with one stage, and one metric. So no network of a metric lies in memory beside the
model, a metric that fails does not stop the others, and any of them can be run by hand, in another
environment.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chameleon_jax import places
from chameleon_jax.errors import UserError, need
from chameleon_jax.evaluation import benches
from launch import cli
from launch.cli import UsageError

if TYPE_CHECKING:
    from chameleon_jax.evaluation.benches import Bench, Sample
    from chameleon_jax.evaluation.generation import Maker, Sink
    from chameleon_jax.evaluation.scores.base import Setup
    from chameleon_jax.inference.mechanisms import SwitchConfig
    from chameleon_jax.inference.pipeline import Pipeline
    from launch.jobs import Job

STAGES = ("generate", "score", "table")
DEMO_SAMPLES = 4
GME_KEY = "CHAMELEON_GME_KEY"  # variable of the environment
# Of these benchmarks alone.
FLAGS = (
    "frames",
    "stage",
    "metric",
    "research",
    "models",
    "samples",
    "vlm_url",
    "vlm_model",
    "vlm_api",
    "vlm_frames",
    "vlm_prompt",
    "gme_url",
    "gme_model",
    "retry_missing",
    "make_demo",
    "lora",
    "mesh",
    "decoder",
)
# What a stage in a process of its own is given.
PASSED = (
    *("bench", "config", "weights", "name", "out", "switch", "steps", "seed", "data", "quantize"),
    *("frames", "models", "samples", "vlm_url", "vlm_model", "vlm_api", "vlm_frames"),
    *("vlm_prompt", "gme_url", "gme_model", "lora", "mesh", "decoder"),
)


def stages_of(text: str) -> list[str]:
    """A kind of flag: names of stages, separated by commas."""
    return [cli.one_of(*STAGES)(word.strip()) for word in text.split(",")]


def define_flags(parser: cli.Parser) -> None:
    """The flags of these benchmarks alone."""
    parser.flag(
        "frames",
        "hgc: of a video; the paper's tables are of 81 and 165; default 81",
        kind=cli.whole_number(1, 10**5),
        metavar="N",
    )
    parser.flag(
        "stage", "hgc: some of generate,score,table; default all", kind=stages_of, metavar="A,B"
    )
    parser.flag(
        "metric",
        "hgc: score with this one; may be repeated; default all that can be used commercially and"
        " lack nothing",
        repeated=True,
        metavar="NAME",
    )
    parser.switch(
        "research",
        "hgc: score also with weights that may not be used commercially",
        default=None,
    )
    parser.flag(
        "models",
        "hgc: folder with the weights of metrics; default ~/.cache/chameleon_jax/metrics",
        metavar="DIR",
    )
    parser.flag(
        "samples",
        f"hgc: only so many, the first ones; of --make_demo, default {DEMO_SAMPLES}",
        kind=cli.whole_number(1, 10**5),
        metavar="N",
    )
    parser.flag(
        "vlm_url",
        "hgc: endpoint of the model that judges garments, such as http://localhost:8000/v1; its"
        " key is read from CHAMELEON_VLM_KEY",
        metavar="URL",
    )
    parser.flag("vlm_model", "hgc: its name there", metavar="NAME")
    parser.flag(
        "vlm_api",
        "hgc: openai, for most servers, or gemini, which is sent whole videos; default openai",
        kind=cli.one_of("openai", "gemini"),
        metavar="NAME",
    )
    parser.flag(
        "vlm_frames",
        "hgc: frames of a video that it looks at; default 16; of gemini, as many as Google chooses",
        kind=cli.whole_number(1, 1000),
        metavar="N",
    )
    parser.flag(
        "vlm_prompt", "hgc: text file to ask it with; default our own words", metavar="FILE"
    )
    parser.flag(
        "gme_url",
        f"hgc: endpoint that embeds texts and pictures with GME; its key is read from {GME_KEY}",
        metavar="URL",
    )
    parser.flag("gme_model", "hgc: its name there", metavar="NAME")
    parser.switch("retry_missing", "hgc: score those videos again that got no figure", default=None)
    parser.flag(
        "make_demo",
        "hgc: write a small benchmark of rendered people in the same layout, and stop",
        metavar="DIR",
    )
    parser.flag(
        "lora",
        "hgc: LoRA to merge, with a strength (1 if none is said); may be repeated",
        repeated=True,
        metavar="FILE[@STRENGTH]",
    )
    parser.mesh_flag()
    parser.decoder_flag()


def run(values: cli.Values, default_config: str) -> int:
    """The benchmark. Returns the command's exit code.

    Raises:
      UserError: an input cannot be used.
    """
    if values.make_demo:
        return make_demo(values)
    bench = benches.load(values.bench)
    if values.data is None:
        raise UsageError(f"--bench {values.bench} needs --data, the folder of {bench.title}")
    values.frames = values.frames or bench.frames
    values.out = values.out or f"out/{values.bench}"
    if Path(values.name).name != values.name or values.name in (".", ".."):
        raise UsageError(f"--name {values.name}: expected the name of a folder")
    stages = [name for name in STAGES if name in (values.stage or STAGES)]
    samples = bench.read(Path(values.data))[: values.samples]
    folder = Path(values.out) / str(values.frames)
    places.check_writable(folder / values.name / "recipe.json")
    chosen = _chosen_metrics(values, bench) if "score" in stages else []
    if stages == ["generate"]:
        return generate(values, default_config, bench, samples, folder / values.name)
    if stages == ["score"] and len(values.metric) == 1:
        return score(values, samples, folder / values.name)
    failed = []
    if "generate" in stages:
        code = _in_own_process(values, "generate")
        if code:
            return code
    for name in chosen:
        if _in_own_process(values, "score", name):
            failed.append(name)
    if "table" in stages:
        print(table(values, bench, samples, folder))
    if failed:
        raise UsageError(
            f"not scored: {', '.join(failed)}; the lines above say why, the same command continues"
        )
    return 0


def make_demo(values: cli.Values) -> int:
    """Write the small benchmark."""
    from chameleon_jax.evaluation import demo_bench

    need("numba", "runway")
    folder, count = Path(values.make_demo), values.samples or DEMO_SAMPLES
    places.check_writable(folder / "meta_data.csv")
    demo_bench.make_demo(folder, count)
    print(f"{folder}: {count} samples; measure a model on them with --bench hgc --data {folder}")
    return 0


def generate(
    values: cli.Values,
    default_config: str,
    bench: Bench,
    samples: Sequence[Sample],
    folder: Path,
) -> int:
    """The first stage: stream a video for every sample."""
    need("av", "video")
    from chameleon_jax import compilation, machine
    from chameleon_jax.evaluation import generation
    from launch import jobs

    cli.start_jax(values)
    values.seed = bench.seed if values.seed is None else values.seed
    job, mechanisms = _stream_job(values, default_config, folder)
    config = job.config
    recipe = {
        "weights": weights_hashes(job.weights, job.seed),
        "loras": {str(path): strength for path, strength in job.loras},
        "decoder": job.decoder,
        "config": config.copy_and_resolve_references().to_dict(),
        "frames": values.frames,
        "seed": job.seed,
        "switch": dataclasses.asdict(mechanisms),
    }
    generation.check_recipe(folder, recipe)
    if all(generation.is_finished(folder, sample.index) for sample in samples):
        print(f"{folder}: all {len(samples)} videos are there")
        return 0
    pipeline = jobs.load_pipeline(job)
    with compilation.announced("the programs of the stream"):
        pipeline.compile()
    size = (config.video.height, config.video.width)
    with _bar(len(samples), "videos") as bar:
        made = generation.generate(
            samples,
            folder,
            make_video(pipeline, mechanisms, values.frames, job.seed),
            size=size,
            fps=config.video.fps,
            common={
                **{name: recipe[name] for name in ("seed", "weights", "loras", "decoder")},
                "device": machine.device().device_kind,
                "mesh": jobs.split_axes(job.mesh),
                "versions": machine.versions(),
                "config": recipe["config"],
            },
            on_video=bar.update,
        )
    print(f"{folder}: {made} videos made, {len(samples)} are there")
    return 0


def _stream_job(values: cli.Values, default_config: str, folder: Path) -> tuple[Job, SwitchConfig]:
    """What is streamed, checked before weights are loaded.

    Raises:
      UserError: something cannot be used, or streams of this length cannot be made.
    """
    from chameleon_jax.attention.policies import make_policy
    from chameleon_jax.inference.schedule import ChunkFrames, plan_stream
    from chameleon_jax.inference.settings import check_config
    from launch import jobs

    config, mechanisms = jobs.read_stream(values, default_config)
    checked = check_config(config)
    plan = plan_stream(values.frames, [], mechanisms, ChunkFrames.of(checked))
    make_policy(**checked.cache).check_length(plan.longest - 1)
    return jobs.Job(**jobs.check_common(values, config), out=folder), mechanisms


def make_video(pipeline: Pipeline, mechanisms: SwitchConfig, frames: int, seed: int) -> Maker:
    """How a pipeline makes the video of a sample: one stream each, from the same seed."""
    from chameleon_jax.evaluation.generation import speeds

    def make(sample: Sample, write: Sink) -> Mapping[str, Any]:
        begin = time.perf_counter()
        session = pipeline.session(mechanisms, measure=True)
        session.start(sample.reference, sample.garment, sample.prompt, seed)
        started = time.perf_counter()
        made = 0
        while made < frames:
            chunk = session.next_chunk()[: frames - made]
            write(chunk)
            made += len(chunk)
        chunks = [
            {"frames": one.frames, "denoise": one.denoise, "decode": one.decode}
            for one in session.timings
        ]
        return {
            "prompt_left_out": pipeline.cut_prompt(sample.prompt)[1],
            "seconds": {"start": started - begin, "all": time.perf_counter() - begin},
            "chunks": chunks,
            **speeds(chunks),
        }

    return make


def weights_hashes(weights: str, seed: int) -> dict[str, str]:
    """What weights are, whatever their folder is called: the hash of each file."""
    from chameleon_jax.data.sources import file_hash
    from chameleon_jax.inference.pretrained import find_weights

    if weights == "random":
        return {"random": str(seed)}
    files = sorted(find_weights(weights).glob("*.safetensors"))
    return {path.name: file_hash(path) for path in files}


def score(values: cli.Values, samples: Sequence[Sample], folder: Path) -> int:
    """The second stage with one metric."""
    from chameleon_jax.evaluation import scoring
    from chameleon_jax.evaluation.scores.registry import METRICS

    (name,) = values.metric
    metric = METRICS[name](_setup(values))
    with _bar(len(samples), name) as bar:
        tally = scoring.score(
            samples,
            folder,
            metric,
            retry_missing=bool(values.retry_missing),
            on_video=bar.update,
        )
    said = [f"{tally.scored} videos scored", f"{tally.known} known"]
    said += [f"{tally.missing} without a figure"] if tally.missing else []
    said += [f"{tally.absent} not made yet"] if tally.absent else []
    said += [f"{tally.unanswered} without an answer"] if tally.unanswered else []
    print(f"{name}: {', '.join(said)}")
    if tally.absent == len(samples):
        raise UsageError(f"{folder}: no videos in it; make them with --stage generate")
    return 0


def table(values: cli.Values, bench: Bench, samples: Sequence[Sample], folder: Path) -> str:
    """The third stage."""
    from chameleon_jax.evaluation import tables

    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; make videos with --stage generate")
    return tables.write(bench, samples, folder, values.frames, _setup(values))


def _chosen_metrics(values: cli.Values, bench: Bench) -> list[str]:
    """Metrics that are asked for, or all that can be; a line on stderr about each that cannot.

    Raises:
      UserError: one was asked for that there is not, or that lacks something.
    """
    from chameleon_jax.evaluation.scores.base import MissingNeedError
    from chameleon_jax.evaluation.scores.registry import METRICS

    setup = _setup(values)
    for name in values.metric:
        cli.one_of(*bench.metrics)(name)
        lacking = METRICS[name].lacking(setup)
        if lacking:
            raise MissingNeedError(lacking)
    if values.metric:
        return list(dict.fromkeys(values.metric))
    chosen = []
    for name in bench.metrics:
        metric = METRICS[name]
        lacking = metric.lacking(setup)
        if not metric.needs.commercial and not values.research:
            lacking = f"{name} is not for commercial use; --research scores with it, too"
        if lacking:
            print(f"note: {lacking}", file=sys.stderr)
        else:
            chosen.append(name)
    return chosen


def _setup(values: cli.Values) -> Setup:
    """What there is for metrics to use.

    Raises:
      UserError: an endpoint that cannot be used, or no such prompt.
    """
    from chameleon_jax.evaluation.scores.base import Setup
    from chameleon_jax.vlm import Endpoint

    endpoints: dict[str, Endpoint | None] = {}
    # Two variables: no server is sent the key of another one.
    for kind, settings in (
        ("vlm", {"api": values.vlm_api or "openai"}),
        ("gme", {"key_name": GME_KEY}),
    ):
        url, model = getattr(values, f"{kind}_url"), getattr(values, f"{kind}_model")
        if (url is None) != (model is None):
            raise UsageError(f"--{kind}_url and --{kind}_model belong together; give both")
        endpoints[kind] = None if url is None else Endpoint.open(url, model, **settings)
    return Setup(
        models=Path(values.models) if values.models else places.cache_folder() / "metrics",
        frames=values.vlm_frames,
        prompt=_prompt(values.vlm_prompt),
        **endpoints,
    )


def _prompt(name: str | None) -> str:
    if name is None:
        return ""
    try:
        text = Path(name).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UsageError(f"--vlm_prompt {name}: cannot be read ({error})") from None
    if not text:
        raise UsageError(f"--vlm_prompt {name}: there is nothing in it")
    return text


def _in_own_process(values: cli.Values, stage: str, metric: str | None = None) -> int:
    """Run this command with one stage, and one metric. Returns its exit code.

    Raises:
      UserError: it was ended by a signal.
      KeyboardInterrupt: it was interrupted.
    """
    words = [word for name in PASSED for word in _words(name, getattr(values, name))]
    words += [f"--config.{override}" for override in values.overrides]
    words += [f"--stage={stage}"] + ([f"--metric={metric}"] if metric else [])
    words += ["--retry_missing"] if values.retry_missing else []
    words += [] if values.compilation_cache else ["--nocompilation_cache"]
    code = subprocess.run([sys.executable, "-m", "launch.evaluate", *words]).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code < 0:
        raise UserError(
            f"{metric or stage}: ended by signal {-code}, perhaps for want of memory; the same"
            " command continues"
        )
    return code


def _words(name: str, value: Any) -> list[str]:
    """A flag as it was given; nothing if it was not."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}={one}" for one in value]
    if isinstance(value, dict):
        value = ",".join(f"{key}={size}" for key, size in value.items())
    return [f"--{name}={value}"]


def _bar(total: int, what: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, file=sys.stderr, dynamic_ncols=True)


if __name__ == "__main__":
    cli.library_module("evaluate_pictures", "python -m launch.evaluate --bench hgc --data DIR")
