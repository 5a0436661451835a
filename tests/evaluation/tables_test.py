"""The table: means, intervals, n in every cell, the paper's rows, and what was not run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chameleon_jax.data.sources import file_hash
from chameleon_jax.evaluation import tables
from chameleon_jax.evaluation.benches import BenchError, Sample, hgc
from chameleon_jax.evaluation.generation import video_path
from chameleon_jax.evaluation.intervals import interval
from chameleon_jax.evaluation.scores.base import Setup
from chameleon_jax.evaluation.scores.registry import METRICS, TITLES
from chameleon_jax.evaluation.scoring import Cache

SAMPLES = [Sample(index, Path("a.png"), Path("b.png"), "") for index in range(240)]
ABOUT = {"version": 1, "files": {}}


def model(folder: Path, name: str, metric: str, values, about=ABOUT) -> Path:
    """A model whose videos have these figures of a metric, one dictionary each."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    cache = Cache(place, metric)
    for index, figures in enumerate(values):
        path = video_path(place, index)
        if not path.exists():
            path.write_bytes(f"video {name} {index}".encode())
        record = {"sample": index, "video": file_hash(path), "about": about, "values": figures}
        cache.add(record | {"frames": 81})
    return place


def marks(hgc_mark, count):
    return [{"hgc": hgc_mark, "lgc": 3, "ntp": 4}] * count


def table(tmp_path, frames=81) -> str:
    return tables.write(hgc.BENCH, SAMPLES, tmp_path, frames, Setup(tmp_path / "models"))


def test_the_interval_of_a_mean():
    found = interval([1.0, 2.0, 3.0, float("nan")])
    assert (found.mean, found.count) == (2, 3) and 1 <= found.low < 2 < found.high <= 3
    assert interval([1.0, 2.0, 3.0]) == interval([1.0, 2.0, 3.0])
    assert interval([]) is None
    same = interval([5.0] * 4)
    assert (same.low, same.mean, same.high) == (5, 5, 5)


def test_scores_are_plain_means_over_240_samples(tmp_path):
    """4.5417, as a row of Table 1 has it, is 1090 / 240."""
    model(tmp_path, "ours", "garment", marks(5, 130) + marks(4, 110))
    text = table(tmp_path)
    assert "| **ours** |" in text and "4.5417 (4." in text and "n 240" in text
    found = json.loads((tmp_path / "table.json").read_text())["models"]["ours"]
    assert found["figures"]["hgc"]["mean"] == 1090 / 240
    low, high = (found["figures"]["hgc"][name] for name in ("low", "high"))
    assert 4.47 < low < 4.49 and 4.59 < high < 4.62  # 1.96 standard errors are 0.063
    assert text == (tmp_path / "table.md").read_text(encoding="utf-8")


def test_missing_scores_are_no_zeros(tmp_path):
    missing = [{"hgc": None, "lgc": None, "ntp": None}]
    model(tmp_path, "ours", "garment", marks(5, 3) + missing)
    model(tmp_path, "theirs", "garment", missing)
    text = table(tmp_path)
    assert "5.0000 (5.0000 to 5.0000), n 3, missing 1" in text
    assert "(`hgc`) | 5.0000 (5.0000 to 5.0000), n 3, missing 1 | n 0, missing 1 |" in text
    found = json.loads((tmp_path / "table.json").read_text())["models"]
    assert found["ours"]["figures"]["hgc"]["count"] == 3
    assert found["theirs"]["figures"] == {} and found["theirs"]["missing"]["hgc"] == 1
    assert "| **theirs** | not run | not run |" in text and text.count("n 0, missing 1") == 6


def test_rows_of_the_paper_stand_beside(tmp_path):
    model(tmp_path, "ours", "amp_paper", [{"amp_paper": 0.5}])
    model(tmp_path, "ours", "amp_opens2v", [{"amp_opens2v": 0.25}])
    short, long = table(tmp_path).splitlines(), table(tmp_path, 165).splitlines()
    head = next(line for line in short if line.startswith("| model |"))
    assert "| Amp. (`amp_paper`) | Amp. (`amp_opens2v`) |" in head and "Cur. (`cur`)" in head
    row = next(line for line in short if line.startswith("| **ours** |"))
    assert "| 0.5000 (0.5000 to 0.5000), n 1 | 0.2500 (0.2500 to 0.2500), n 1 |" in row
    assert row.count("not run") == 8 and row.count("|") == head.count("|")
    paper = next(line for line in short if line.startswith("| FashionChameleon, 5B (Table 1) |"))
    assert "| 0.4911 | 0.6839 | 0.7771 | 0.7771 |" in paper and paper.count("|") == head.count("|")
    assert not any("Table 3" in line and line.startswith("| GR-DMD") for line in short)
    assert any(line.startswith("| GR-DMD, tau 0.2 (Table 3) | 0.4265 |") for line in long)


def test_a_folder_without_videos(tmp_path):
    with pytest.raises(BenchError, match="no videos of a model in it; make them"):
        table(tmp_path)


def test_other_lengths_have_no_rows_of_the_paper(tmp_path):
    model(tmp_path, "ours", "amp_paper", [{"amp_paper": 0.5}])
    assert "(Table" not in table(tmp_path, 9).partition("## Notes")[0]


def test_only_figures_of_one_metric_and_of_these_videos_count(tmp_path):
    place = model(tmp_path, "ours", "amp_paper", [{"amp_paper": 1.0}] * 4)
    other = ABOUT | {"version": 2}
    model(tmp_path, "ours", "amp_paper", [{"amp_paper": 3.0}] * 2, other)
    assert "3.0000 (3.0000 to 3.0000), n 2" in table(tmp_path)
    video_path(place, 1).write_bytes(b"another video")
    assert "3.0000 (3.0000 to 3.0000), n 1" in table(tmp_path)


def test_samples_that_were_not_asked_for_do_not_count(tmp_path):
    model(tmp_path, "ours", "amp_paper", [{"amp_paper": float(i)} for i in range(4)])
    summary = tables.summarize(hgc.BENCH, SAMPLES[:2], tmp_path / "ours")
    assert (summary.figures["amp_paper"].mean, summary.figures["amp_paper"].count) == (0.5, 2)


def test_speed_comes_from_what_lies_beside_the_videos(tmp_path):
    place = model(tmp_path, "ours", "amp_paper", [{"amp_paper": 1.0}] * 2)
    report = {"fps_paper": 20.0, "fps_denoise": 22.0, "fps_decoded": 11.0, "device": "H200"}
    video_path(place, 0).with_suffix(".json").write_text(json.dumps(report))
    text = table(tmp_path)
    assert "20.0000 (20.0000 to 20.0000), n 1" in text and "made on H200" in text


def test_what_was_not_run_is_said_with_the_reason(tmp_path):
    model(tmp_path, "ours", "amp_paper", [{"amp_paper": 1.0}])
    text = table(tmp_path).partition("## Not run")[2].partition("## Made with")[0]
    assert f"- cur needs in {tmp_path / 'models'}: face_detection_yunet_2023mar.onnx" in text
    assert "research only" in text and "Not for commercial use." in text
    assert "- garment needs an endpoint: give --vlm_url and --vlm_model." in text
    assert "- smoo_flow lacks nothing: score with it" in text and "amp_paper" not in text


def test_the_table_says_which_weights_and_model(tmp_path):
    about = {"version": 1, "files": {"musiq_spaq.onnx": "0123abcd"}}
    model(tmp_path, "ours", "vq_musiq", [{"vq_musiq": 0.7}], about)
    asked = ABOUT | {"model": "judge-1", "prompt": "f00d", "sees": "16 frames"}
    model(tmp_path, "ours", "garment", marks(5, 1), asked)
    text = table(tmp_path)
    assert "`vq_musiq`: version 1, musiq_spaq.onnx 0123abcd (weights Apache-2.0" in text
    assert "`garment`: version 1, model judge-1, prompt f00d, sees 16 frames" in text


def test_videos_of_another_length_are_pointed_at(tmp_path):
    model(tmp_path, "ours", "amp_paper", [{"amp_paper": 1.0}])
    assert "not all of" not in table(tmp_path)
    assert "**not all of 165 frames, but of 81**" in table(tmp_path, 165)


def test_every_figure_has_a_title_and_every_metric_says_its_terms():
    columns = [column for metric in METRICS.values() for column in metric.columns]
    assert len(columns) == len(set(columns)) and set(columns) < set(TITLES)
    assert set(METRICS) == set(hgc.BENCH.metrics)
    for column in hgc.BENCH.columns:
        assert set(column.figures) <= set(TITLES)
    for metric in METRICS.values():
        assert all(file.licence and file.source for file in metric.needs.files)
        assert metric.needs.extra == ("eval" if metric.needs.commercial else "eval-nc")
    closed = {name for name, metric in METRICS.items() if not metric.needs.commercial}
    assert closed == {"cur", "arc", "smoo_amt", "vq_musiq"}


@pytest.mark.parametrize("name", list(METRICS))
def test_no_metric_is_made_without_what_it_needs(tmp_path, name):
    metric = METRICS[name]
    lacking = metric.lacking(Setup(tmp_path))
    assert bool(lacking) == bool(metric.needs.files or metric.needs.endpoint)
    assert "\n" not in lacking
