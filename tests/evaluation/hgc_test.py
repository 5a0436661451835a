"""HGC-Bench as it is published, with its quirks; and what is said of one that is not."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from chameleon_jax.data.images import open_image
from chameleon_jax.evaluation import benches
from chameleon_jax.evaluation.benches import BenchError, hgc
from launch import cli, evaluate

PROMPT = 'She says "hi", then turns;\nher coat, red, swings.'


def cell(prompt: str = PROMPT) -> str:
    return json.dumps({"caption": {"en_short": prompt, "cn_short": "她转身。"}}, ensure_ascii=False)


def write(folder, rows, *, head=hgc.COLUMNS, before="", pictures=("a.png", "b.png")):
    """A benchmark with pictures and a table as Python's csv writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in pictures:
        Image.new("RGB", (4, 6), (200, 10, 10)).save(folder / name)
    text = io.StringIO(newline="")
    csv.writer(text).writerows([head, *rows])
    (folder / hgc.TABLE).write_bytes((before + text.getvalue()).encode("utf-8"))
    return folder


def test_a_benchmark_is_found_by_its_file():
    assert "hgc" in benches.names() and benches.load("hgc") is hgc.BENCH


def test_a_new_benchmark_is_one_file(tmp_path, monkeypatch):
    text = """
from chameleon_jax.evaluation.benches import Bench, Sample

def read(folder):
    return [Sample(0, folder / "a.png", folder / "b.png", "a person walks")]

BENCH = Bench(title="Mine", read=read, metrics=("amp_paper",), frames=33)
"""
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.setattr(benches, "__path__", [*benches.__path__, str(tmp_path)])
    assert benches.names() == ["hgc", "mine"]
    assert benches.load("mine").read(tmp_path)[0].prompt == "a person walks"
    values = cli.read(evaluate.define_flags, ["--bench=mine", f"--data={tmp_path}"])
    assert values.bench == "mine"
    with pytest.raises(cli.UsageError, match="expected one of runway, judge, attention, hgc, mine"):
        cli.read(evaluate.define_flags, ["--bench=their"])


def test_json_in_quotes_behind_a_byte_order_mark(tmp_path):
    folder = write(tmp_path / "bench", [["a.png", "b.png", cell()]], before="\ufeff")
    (sample,) = hgc.read(folder)
    assert sample == benches.Sample(0, folder / "a.png", folder / "b.png", PROMPT)


@pytest.mark.parametrize("path", ["a.png", "HGC-Bench/a.png", "HGC-Bench\\a.png", "./a.png"])
def test_paths_of_the_folder_and_of_the_one_above(tmp_path, path):
    folder = write(tmp_path / "HGC-Bench", [[path, "b.png", cell()]])
    (sample,) = hgc.read(folder)
    assert sample.reference.samefile(folder / "a.png")


def test_paths_of_the_working_directory(tmp_path, monkeypatch):
    folder = write(tmp_path / "somewhere" / "bench", [["pictures/c.png", "b.png", cell()]])
    (tmp_path / "pictures").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "pictures" / "c.png")
    monkeypatch.chdir(tmp_path)
    assert hgc.read(folder)[0].reference.samefile(tmp_path / "pictures" / "c.png")


def test_pictures_that_are_not_rgb(tmp_path):
    folder = write(tmp_path / "bench", [["grey.png", "clear.png", cell()]])
    Image.new("L", (5, 7), 90).save(folder / "grey.png")
    Image.new("RGBA", (5, 7), (255, 0, 0, 0)).save(folder / "clear.png")
    (sample,) = hgc.read(folder)
    assert np.all(np.asarray(open_image(sample.reference)) == 90)
    assert np.all(np.asarray(open_image(sample.garment)) == 255)  # on white


def test_no_table(tmp_path):
    with pytest.raises(
        BenchError, match="no meta_data.csv in it; expected the folder of HGC-Bench"
    ):
        hgc.read(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([["c.png", "b.png", cell()], ["a.png", "d.png", cell()]], "c.png .row 1., d.png .row 2."),
        ([["", "b.png", cell()]], "row 1: column src_image is empty"),
        ([["a.png", "b.png", "a person walks"]], "row 1: prompt is not JSON .*'a person walks'"),
        ([["a.png", "b.png", "{'caption': 1}"]], "prompt is not JSON"),
        ([["a.png", "b.png", '{"caption": {"cn_short": "她"}}']], "no caption.en_short"),
        ([["a.png", "b.png", "[1]"]], "no caption.en_short"),
        ([["a.png", "b.png", cell("  ")]], "caption.en_short is empty"),
        ([["a.png", "b.png", cell(), "more"]], "row 1 has 4 values, the header 3"),
    ],
)
def test_rows_that_cannot_be_read(tmp_path, rows, message):
    folder = write(tmp_path / "bench", rows)
    with pytest.raises(BenchError, match=message) as caught:
        hgc.read(folder)
    assert "\n" not in str(caught.value)


def test_columns_that_are_not_there(tmp_path):
    folder = write(tmp_path / "bench", [["a.png", "b.png", "x"]], head=("src", "cloth", "prompt"))
    with pytest.raises(BenchError, match="no column src_image, cloth_image; .* found src, cloth"):
        hgc.read(folder)


def test_many_missing_pictures_are_one_line(tmp_path):
    rows = [[f"{number}.png", "b.png", cell()] for number in range(9)]
    with pytest.raises(BenchError, match="0.png .row 1., 1.png .row 2., 2.png .row 3. and 6 more"):
        hgc.read(write(tmp_path / "bench", rows))


def test_the_rows_of_the_paper():
    """Four tables; what is compared twice there stands once."""
    short, long = (hgc.BENCH.rows[frames] for frames in (81, 165))
    assert len(short) == 8 + 4 and len(long) == 5 + 2
    ours = next(row for row in short if row.model == "FashionChameleon, 5B")
    assert ours.values["Cur."] == 0.4911 and ours.values["FPS"] == 23.8
    titles = {column.title for column in hgc.BENCH.columns}
    assert all(set(row.values) <= titles for row in (*short, *long))


def test_most_scores_of_the_paper_are_means_of_whole_numbers_over_240_samples():
    rows = [row for rows in hgc.BENCH.rows.values() for row in rows]
    scores = [row.values[title] for row in rows for title in ("HGC", "LGC", "NTP")]
    assert len(scores) == 57
    assert round(1090 / 240, 4) == hgc.TABLE_1["Edit + I2V, 20B + 5B"][5]
    assert sum(round(round(score * 240) / 240, 4) == score for score in scores) == 51
