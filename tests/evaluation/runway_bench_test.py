"""Runway-Bench: scenarios are fixed, measures by hand, the truth beats the unchanged truth."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from chameleon_jax import runway
from chameleon_jax.data import labels, records, sources
from chameleon_jax.data.examples import RunwayExamples
from chameleon_jax.data.rendered import RenderedSource
from chameleon_jax.evaluation import judge, runway_bench, scenarios
from chameleon_jax.runway import asset
from chameleon_jax.splits import split_of
from launch import evaluate, evaluate_runway

CARD = {"same_person": 0.5}


@pytest.fixture(scope="module")
def two():
    """A scenario with two changes, short enough for a test, and its truth."""
    (found,) = scenarios.scenarios("mirror", 1, ["two"])
    spec = dataclasses.replace(found.spec, frames=54)
    found = dataclasses.replace(found, spec=spec, starts=(0, 18, 36))
    return found, scenarios.render(found)


def perfect(truth: scenarios.Truth, starts: tuple[int, ...]) -> judge.Readings:
    """What a judge without faults would read in the truth."""
    frames = len(truth.video)
    numbers = np.searchsorted(starts, np.arange(frames), side="right") - 1
    attributes = np.stack([truth.attributes[n] for n in numbers])
    person = np.tile(np.eye(4)[0], (frames, 1))
    return judge.Readings(
        labels=truth.labels,
        joints=truth.joints,
        types=np.eye(len(labels.TYPES))[attributes[:, 1].astype(int)],
        patterns=np.eye(len(labels.PATTERNS))[attributes[:, 2].astype(int)],
        person=person,
    )


def test_scenarios_are_the_same_every_time_and_no_training_clips():
    assert evaluate_runway.MOST == scenarios.MOST  # the first is for a command line
    some = scenarios.scenarios("mirror", 128)
    assert len(some) == 128 and len({one.name for one in some}) == 128
    again = {one.name: one for one in scenarios.scenarios("mirror", 40)}
    for one in some:
        assert split_of(one.spec.seed) == "validation"
        assert one.name not in again or again[one.name] == one
        assert one.frames > one.starts[-1]
        for garment, later in zip(one.garments, one.garments[1:], strict=False):
            assert garment.slot == later.slot and garment.colours[0] != later.colours[0]
    held_out = [runway.held_out(g) for one in some for g in one.garments[1:]]
    assert 0.4 < np.mean(held_out) < 0.7
    prompts = [one.prompts for one in some if one.kind == "prompt"]
    assert all(len(texts) == 2 and texts[0][1] != texts[1][1] for texts in prompts)
    assert [one.kind for one in scenarios.scenarios("open", 128, ["five", "long"])].count(
        "five"
    ) == 16
    with pytest.raises(ValueError, match="kinds .'six'., count 128: expected kinds of one, two"):
        scenarios.scenarios("mirror", 128, ["six"])


def test_only_the_garment_changes_in_the_truth(two):
    scenario, truth = two
    assert truth.video.shape == (54, 128, 80, 3) and len(truth.pictures) == 3
    assert [scenario.worn(frame) for frame in (0, 17, 18, 35, 36, 53)] == [0, 0, 1, 1, 2, 2]
    before, after = truth.video[17].astype(int), truth.video[18].astype(int)
    shown = (truth.labels[17] == labels.GARMENT) & (truth.labels[18] == labels.GARMENT)
    background = (truth.labels[17] == 0) & (truth.labels[18] == 0)
    changed = np.abs(after - before).mean(-1)
    assert changed[shown].mean() > 20 and changed[background].mean() < 2


def test_a_perfect_video_has_perfect_figures(two):
    scenario, truth = two
    made = runway_bench.Made(truth.video, perfect(truth, scenario.starts), scenario.starts)
    figures = runway_bench.measure(scenario, truth, made, made.seen.part(slice(1)), CARD)
    for name in ("type", "pattern", "colours", "type_and_colours"):
        assert figures[f"first_{name}"] == figures[f"changed_{name}"] == 1
    assert figures["changed_colour_distance"] < 2  # a garment turns and is lit otherwise
    assert figures["wrong_frames"] == 0 and figures["person_same"] == 1
    assert figures["first_garment_psnr"] == figures["background_psnr"] == 90
    assert figures["clothes_distance"] == 0
    assert figures["jump_joints"] < 4 and figures["jump_background"] < 2
    assert set(figures) <= set(evaluate_runway.NAMES)


def test_the_garment_of_the_start_is_wrong_after_a_change(two):
    scenario, truth = two
    worn = (0, 0, 1)  # always one too late
    late = dataclasses.replace(scenario, garments=tuple(scenario.garments[i] for i in worn))
    shown = scenarios.render(late)
    made = runway_bench.Made(shown.video, perfect(shown, scenario.starts), scenario.starts)
    figures = runway_bench.measure(scenario, truth, made, made.seen.part(slice(1)), CARD)
    assert figures["first_pattern"] == figures["first_colours"] == 1
    assert figures["changed_pattern"] == figures["changed_colours"] == 0
    assert figures["changed_colour_distance"] > 15 and figures["wrong_frames"] == 1


def test_where_no_garment_is_seen_none_is_right(two):
    scenario, truth = two
    seen = perfect(truth, scenario.starts)
    naked = np.where(truth.labels == labels.GARMENT, labels.SKIN, truth.labels)
    made = runway_bench.Made(truth.video, dataclasses.replace(seen, labels=naked), scenario.starts)
    figures = runway_bench.garment_figures(scenario, truth, made)
    assert figures["first_colours"] == figures["changed_colours"] == 0
    assert figures["wrong_frames"] == 0 and "changed_colour_distance" not in figures


def test_a_cut_is_a_jump_and_a_blur_is_not_sharp(two):
    scenario, truth = two
    video = truth.video.copy()
    video[18:] = np.roll(video[18:], 6, axis=2)
    seen = perfect(truth, scenario.starts)
    moved = seen.joints.copy()
    moved[18:, :, 0] += 6 / 80
    seen = dataclasses.replace(seen, joints=moved)
    jumps = runway_bench.jump_figures(runway_bench.Made(video, seen, scenario.starts), 18)
    assert jumps["jump_joints"] > 10 and jumps["jump_head"] > 3
    shifted = dataclasses.replace(seen, labels=np.roll(seen.labels, 6, axis=2))
    shifted.labels[:18] = truth.labels[:18]
    moved = runway_bench.jump_figures(runway_bench.Made(video, shifted, scenario.starts), 18)
    still = runway_bench.jump_figures(runway_bench.Made(truth.video, seen, scenario.starts), 18)
    assert moved["jump_place"] > 10 and still["jump_place"] < 2.5
    blurred = truth.video.copy()
    blurred[-12:] = blurred[-12:, ::4, ::4].repeat(4, axis=1).repeat(4, axis=2)
    blurred[-12:] = (blurred[-12:] // 4) + 96
    one = runway_bench.sharpness_figures(runway_bench.Made(blurred, seen, (0,)))
    assert one["head_sharpness"] < 0.6 and one["garment_sharpness"] < 0.6
    same = runway_bench.sharpness_figures(runway_bench.Made(truth.video, seen, (0,)))
    assert 0.7 < same["head_sharpness"] < 1.4


def mirror(joints: np.ndarray) -> np.ndarray:
    """The joints in the mirror: what is left is right, in the picture and of the body."""
    bones = asset.load().bone
    swapped = [bones[_other_side(name)] for name in asset.load().bones]
    return (joints * (-1, 1) + (1, 0))[:, swapped]


def _other_side(name: str) -> str:
    for one, other in ((".L", ".R"), (".R", ".L")):
        if name.endswith(one):
            return name.removesuffix(one) + other
    return name


def test_the_prompt_is_followed_by_the_truth_and_not_by_its_mirror_image():
    followed, mirrored = [], []
    for scenario in scenarios.scenarios("mirror", 128, ["two"]):
        motion = scenario.spec.motion
        if motion.posed or motion.gesture not in ("hip", "collar") or len(followed) == 4:
            continue
        joints = np.stack([scenarios._joints(scenario.spec, frame) for frame in range(81)])
        asked, poses, frame = scenarios.arm_poses(scenario)
        assert asked in poses and 0 < frame < 81
        truth = scenarios.Truth(*(None,) * 4, joints=joints, attributes=())
        for where, results in ((joints, followed), (mirror(joints), mirrored)):
            seen = judge.Readings(None, where, None, None, None)
            made = runway_bench.Made(None, seen, (0,))
            figures = runway_bench.prompt_figures(scenario, truth, made)
            results.append(figures["prompt_arms"])
            if "prompt_side" in figures:
                assert figures["prompt_side"] == (where is joints)
    assert np.mean(followed) == 1
    assert np.mean(mirrored) == 0


def test_the_judge_of_the_project_reads_the_truth(two):
    scenario, truth = two
    ours = judge.load_judge(evaluate_runway.judge_of("mirror"))
    assert ours.card["world"] == scenario.spec.world == "mirror"
    slot = scenario.spec.slot
    seen = ours(truth.video[16:20], slot)  # the garment changes in the middle
    for part in (labels.BACKGROUND, labels.GARMENT, labels.HEAD):
        mine, true = seen.labels == part, truth.labels[16:20] == part
        assert (mine & true).sum() > 0.8 * (mine | true).sum()  # half the grid, see judge.json
    for frames, worn in ((slice(0, 2), 0), (slice(2, 4), 1)):
        assert seen.patterns[frames].mean(0).argmax() == int(truth.attributes[worn][2])
    reference = ours(truth.reference[None], slot)
    figures = runway_bench.person_figures(
        runway_bench.Made(truth.video[16:20], seen, (0,)), reference, ours.card["same_person"]
    )
    assert figures["person_same"] == 1


def test_the_judge_of_the_open_world_reads_what_is_asked_for():
    """Of two garments that are worn, each in turn is the one in question."""
    ours = judge.load_judge(evaluate_runway.judge_of("open"))
    assert ours.card["world"] == "open"
    found = scenarios.scenarios("open", 12, ["two"])
    found = next(one for one in found if {"top", "bottom"} == one.spec.outfit.keys())
    spec = dataclasses.replace(found.spec, frames=4)
    truth = scenarios.render(dataclasses.replace(found, spec=spec, starts=(0, 2, 3)))
    parts = labels.GARMENT, labels.CLOTHES
    with pytest.raises(judge.JudgeError, match="slot is 'hat'; expected one of top, dress, outer"):
        ours(truth.video, "hat")
    slots = (spec.slot, *(spec.outfit.keys() - {spec.slot}))
    for slot, part in zip(slots, parts, strict=True):
        seen = ours(truth.video, slot)
        for other in parts:
            mine, true = seen.labels == labels.GARMENT, truth.labels == other
            overlap = (mine & true).sum() / (mine | true).sum()
            assert overlap > 0.6 if other == part else overlap < 0.1, (slot, other, overlap)
        assert labels.SLOTS[labels.SLOT_OF[seen.types.mean(0).argmax()]] == slot


def test_a_judge_of_another_world_is_refused(tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        evaluate.main(
            ["--world=open", f"--judge={evaluate_runway.judge_of('mirror')}", f"--out={tmp_path}"]
        )
    assert ended.value.code == 2
    assert "was measured on the world mirror, not open" in capfd.readouterr().err
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["--world=moon", f"--out={tmp_path}"])
    assert ended.value.code == 2
    assert "--world is 'moon'; expected one of mirror, open" in capfd.readouterr().err


def test_intervals_hold_the_mean_and_shrink():
    rng = np.random.default_rng(0)
    few, many = (
        runway_bench.summarize([{"a": float(x)} for x in rng.normal(1, 1, n)]) for n in (10, 1000)
    )
    for one, count in ((few["a"], 10), (many["a"], 1000)):
        assert one.low < one.mean < one.high and one.count == count
    assert many["a"].high - many["a"].low < 0.3 * (few["a"].high - few["a"].low)
    mixed = runway_bench.summarize([{"a": 1.0}, {"a": math.nan, "b": 2.0}, {"a": 3.0}])
    assert mixed["a"].mean == 2 and mixed["a"].count == 2 and mixed["b"].count == 1
    text = runway_bench.table({"x": mixed, "y": few}, str.upper)
    assert text.splitlines()[0] == "| figure | x | y |" and "| B | 2 (2 to 2) |  |" in text


def test_where_one_person_ends_and_another_begins():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 16))
    vectors = centres.repeat(4, axis=0) + 0.3 * rng.normal(size=(80, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    card = judge.same_person(vectors, np.arange(80) // 4)
    assert 0.3 < card["same_person"] < 0.9 and card["same_person_right"] > 0.95
    with pytest.raises(judge.JudgeError, match="no two clips of one person"):
        judge.same_person(vectors[::4], np.arange(20))


@pytest.mark.slow
@pytest.mark.parametrize(("world", "slots"), [("mirror", 0), ("open", 4)])
def test_a_judge_is_trained_checked_and_used(tmp_path, world, slots):
    from chameleon_jax.config import load_config
    from chameleon_jax.training.run import run

    make = RunwayExamples((32, 32), frames=2, world=world, labels=True, people=2)
    for start in (0, 800_000):
        records.prepare_runway(tmp_path / "data", 8, make, seed_start=start, workers=0)
    run(
        load_config(
            "configs/judge.py:smoke",
            [
                f"data.dir={tmp_path / 'data'}",
                f"workdir={tmp_path / 'run'}",
                "people.each=2",
                f"model.judge.slots={slots}",
            ],
        )
    )
    folder = tmp_path / "run" / "export"
    assert {path.name for path in folder.iterdir()} == {"judge.safetensors", "config.json"}
    with pytest.raises(judge.JudgeError, match=r"has no judge\.json; measure the judge first"):
        judge.load_judge(folder)
    source = sources.open_sources(
        tmp_path / "data", "validation", ("labels", "joints", "attributes")
    )
    card = judge.check(folder, source, (32, 32))
    assert card == json.loads((folder / "judge.json").read_text()) and card["frames"] == 8
    trained = judge.load_judge(folder)
    assert trained.card == card
    record = source.load(0, 2, (32, 32))
    seen, elsewhere = (trained(record["video"], slot) for slot in ("top", "bottom"))
    assert (seen.types == elsewhere.types).all() == (not slots)
    if not slots:
        several = RenderedSource(
            range(8), (32, 32), world="open", people=2, labels=("labels", "joints", "attributes")
        )
        with pytest.raises(judge.JudgeError, match="a judge with slots=0, and garments of top, "):
            judge.check(folder, several, (32, 32))
        assert json.loads((folder / "judge.json").read_text()) == card
    assert seen.labels.shape == (2, 32, 32) and seen.joints.shape == (2, 36, 2)
    np.testing.assert_allclose(np.linalg.norm(seen.person, axis=-1), 1, rtol=1e-3)


@pytest.mark.slow
def test_the_embedded_model_and_its_vae_on_a_scenario(tmp_path, capsys):
    """The whole command: four columns, of which the VAE's is nearer to the truth than the model's;
    called again it makes nothing anew.
    """
    flags = ["--kind=two", "--scenarios=1", "--vae", "--name=mine", f"--out={tmp_path}"]
    for _ in range(2):
        with pytest.raises(SystemExit) as exit_:
            evaluate.main(flags)
        assert not exit_.value.code
        head, *_ = capsys.readouterr().out.splitlines()
        assert head == "| figure | truth | unchanged | mine_vae | mine |"
        made = sorted(tmp_path.glob("mirror/*/two_000.*"))
        times = [path.stat().st_mtime_ns for path in made]
    figures = {
        name: json.loads((tmp_path / f"mirror/{name}/two_000.json").read_text())["figures"]
        for name in ("truth", "unchanged", "mine_vae", "mine")
    }
    psnr = {name: one["first_garment_psnr"] for name, one in figures.items()}
    assert psnr["truth"] == 90 and 90 > psnr["mine_vae"] > psnr["mine"] + 2 > 14, psnr
    assert figures["mine_vae"]["wrong_frames"] == 0 and len(made) == 8
    assert times == [path.stat().st_mtime_ns for path in made]
