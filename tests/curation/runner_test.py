"""Stages and the serial runner: nothing is dropped, nothing is looked at twice."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from chameleon_jax.curation import calibrate
from chameleon_jax.curation.clip import Clip
from chameleon_jax.curation.journal import Journal, only_run
from chameleon_jax.curation.runner import MAX_UNANSWERED, SerialRunner
from chameleon_jax.curation.stage import CurationError, Found, Limits, Stage, check_order
from tests.curation.made import Numbered, clip, refused

NAMES = ("a", "b", "c", "d", "e")
VALUES = dict(zip(NAMES, (0.0, 1.0, 2.0, 3.0, 4.0), strict=True))


def clips() -> list[Clip]:
    return [clip(name) for name in NAMES]


def test_a_batch_goes_in_and_a_batch_comes_out_without_a_runner():
    stage = Numbered("size", VALUES, least=2.0)
    out = stage(clips())
    assert [one.id for one in out] == list(NAMES)
    assert [one.rejection is None for one in out] == [False, False, True, True, True]
    why = refused(out[1])
    assert (why.stage, why.reason, why.value, why.threshold) == ("size", "size too low", 1.0, 2.0)
    assert out[1].measured == {"size": 1.0} and out[1].versions == {"size": "1"}
    assert stage(out) == out  # what is out passes through; what is in is judged alike


def test_later_stages_do_not_look_at_what_is_out():
    first, second = Numbered("one", VALUES, least=3.0), Numbered("two", VALUES)
    out = SerialRunner([[first, second]], only_here(), batch=2)(clips())
    assert second.asked == ["d", "e"]
    assert [one.id for one in out] == list(NAMES)
    assert set(out[0].measured) == {"one"} and set(out[4].measured) == {"one", "two"}


def only_here():
    import tempfile
    from pathlib import Path

    return Path(tempfile.mkdtemp())


def test_nan_is_refused():
    stage = Numbered("size", dict.fromkeys(NAMES, float("nan")))
    assert all(one.rejection is not None for one in stage(clips()))


class Killed(Exception):
    """What stands for a signal."""


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    first = Numbered("one", VALUES)

    class Dies(Numbered):
        def measure(self, clips):
            if "c" in [one.id for one in clips]:
                raise Killed
            return super().measure(clips)

    with pytest.raises(Killed):
        SerialRunner([[first, Dies("two", VALUES)]], tmp_path, batch=1)(clips())
    assert first.asked == ["a", "b", "c"]
    again, second = Numbered("one", VALUES), Numbered("two", VALUES)
    out = SerialRunner([[again, second]], tmp_path, batch=1)(clips())
    assert again.asked == ["d", "e"] and second.asked == ["c", "d", "e"]
    whole = SerialRunner([[Numbered("one", VALUES), Numbered("two", VALUES)]], only_here())
    assert out == whole(clips())


def test_a_torn_line_is_cut_off_and_looked_at_again(tmp_path):
    SerialRunner([[Numbered("one", VALUES)]], tmp_path)(clips())
    path = tmp_path / "journal/one.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    again = Numbered("one", VALUES)
    SerialRunner([[again]], tmp_path)(clips())
    assert again.asked == ["e"]
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 5


def test_other_thresholds_need_no_second_look_and_another_version_does(tmp_path):
    SerialRunner([[Numbered("one", VALUES, least=1.0)]], tmp_path)(clips())
    stricter = Numbered("one", VALUES, least=4.0)
    out = SerialRunner([[stricter]], tmp_path)(clips())
    assert stricter.asked == [] and [one.rejection is None for one in out].count(True) == 1
    newer = Numbered("one", VALUES)
    newer.version = "2"
    SerialRunner([[newer]], tmp_path)(clips())
    assert newer.asked == list(NAMES)


def test_a_line_that_is_none_is_named(tmp_path):
    path = tmp_path / "journal/one.jsonl"
    path.parent.mkdir()
    path.write_text('{"clip": "a"}\n')
    with pytest.raises(CurationError, match="line 1 is not one of a journal"):
        Journal(tmp_path, Numbered("one", VALUES))


class Silent(Stage):
    """Nobody answers about some clips."""

    name, version = "silent", "1"

    def __init__(self, *about: str):
        self.about, self.asked = about, []

    def measure(self, clips):
        self.asked += [one.id for one in clips]
        no = ("no answer", 0, 3, "busy")
        return [
            Found(refused=no, passing=True) if one.id in self.about else Found() for one in clips
        ]


def test_what_nobody_answered_is_asked_again_in_the_next_run(tmp_path):
    out = SerialRunner([[Silent("b")]], tmp_path)(clips())
    assert refused(out[1]).reason == "no answer"
    again = Silent()
    out = SerialRunner([[again]], tmp_path)(clips())
    assert again.asked == ["b"] and out[1].rejection is None


def test_a_run_stops_when_nobody_answers_any_more(tmp_path):
    many = [clip(str(i)) for i in range(3 * MAX_UNANSWERED)]
    stage = Silent(*(one.id for one in many))
    with pytest.raises(CurationError, match="no answer about 5 clips in a row"):
        SerialRunner([[stage]], tmp_path, batch=1)(many)
    assert len(stage.asked) == MAX_UNANSWERED


def test_order_and_names_of_stages():
    with pytest.raises(CurationError, match="needs two before it"):
        check_order([Numbered("one", VALUES, needs=("two",))])
    with pytest.raises(CurationError, match="is there twice"):
        check_order([Numbered("one", VALUES), Numbered("one", VALUES)])


def test_only_one_process_curates_into_a_folder(tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from chameleon_jax.curation.journal import only_run\n"
        "with only_run(Path(sys.argv[1])): pass"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with only_run(tmp_path):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode and "another process curates into this folder" in done.stderr
    subprocess.run(command, check=True)


def test_clips_and_findings_survive_json():
    one = Numbered("size", VALUES, least=9.0)([clip("a")])[0]
    assert Clip.from_json(json.loads(json.dumps(one.to_json()))) == one
    found = Found({"a": 1.0}, ["x"], ("no", 1, 2, "why"), True)
    assert Found.from_json(json.loads(json.dumps(found.to_json()))) == found


class Graded(Numbered):
    """Its limit may be chosen."""

    def __init__(self, values):
        super().__init__("flow", values, least=100.0)
        self.graded = ("flow",)


@pytest.mark.parametrize(("keep", "left"), [(0.4, 40), (1.0, 100), (0.05, 5)])
def test_keep_chooses_a_threshold(tmp_path, keep, left):
    some = [clip(f"{i:03d}") for i in range(100)]
    stage = Graded({one.id: float(i) for i, one in enumerate(some)})
    runner = SerialRunner([[stage]], tmp_path)
    chosen = calibrate.calibrate(runner, [[stage]], some, keep)
    assert stage.limits == {"flow": Limits(least=100.0)}  # as it was
    calibrate.apply([stage], chosen)
    out = runner.run_group([stage], some)
    assert len(stage.asked) == 100  # measured once
    assert abs(sum(one.rejection is None for one in out) - left) <= 1


def test_keep_counts_clips_that_pass_all_values():
    import numpy as np

    rng = np.random.default_rng(0)
    values = {"flow": rng.random(1000), "blocks": rng.random(1000)}
    chosen = calibrate.choose_limits(values, 0.5)
    passing = (values["flow"] >= chosen["flow"]) & (values["blocks"] <= chosen["blocks"])
    assert abs(passing.mean() - 0.5) < 0.01
    assert 0.2 < chosen["flow"] < 0.4 and 0.6 < chosen["blocks"] < 0.8


def test_too_few_clips_to_choose_by(tmp_path):
    stage = Graded(VALUES)
    with pytest.raises(CurationError, match="2 clips of the sample"):
        calibrate.calibrate(SerialRunner([[stage]], tmp_path), [[stage]], clips()[:2], 0.4)
