"""Sources: a plain folder of clips, broken ones included, and several sets as one."""

from __future__ import annotations

import csv
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from chameleon_jax.data import images, sources, video
from chameleon_jax.data.loader import Loader, LoaderConfig
from chameleon_jax.data.sources import (
    BucketSource,
    DirectorySource,
    JoinedSource,
    MatchingSource,
    SourceError,
)
from tests.data.made_clips import MATRICES, corners, with_matrix

PROMPT = json.dumps({"en_long": ["She turns.", "A room."]})


def write_clip(folder, name: str, size: tuple[int, int], level: int) -> dict[str, str]:
    frames = np.full((7, *size, 3), level, np.uint8)
    video.write_video(folder / f"{name}.mp4", frames, 16)
    Image.fromarray(frames[0]).save(folder / f"{name}_src.png")
    Image.fromarray(frames[0]).save(folder / f"{name}_cloth.png")
    return {"video": f"{name}.mp4", "prompt": PROMPT, "width": str(size[1]), "height": str(size[0])}


def write_table(folder, rows: list[dict[str, str]]) -> None:
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["video", "prompt", "width", "height", "fps"])
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_folder_with_a_table(tmp_path, form):
    rows = [write_clip(tmp_path, "a", (40, 30), 90), write_clip(tmp_path, "b", (30, 40), 160)]
    if form == "csv":
        write_table(tmp_path, rows)
    else:
        (tmp_path / "table.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = sources.open_sources(tmp_path)
    assert source.kind == "pixels" and len(source) == 2
    np.testing.assert_array_equal(source.sizes, [[40, 30], [30, 40]])
    sample = source.load(1, 5, (32, 16))
    assert sample["video"].shape == (5, 32, 16, 3) and abs(int(sample["video"].mean()) - 160) <= 2
    np.testing.assert_array_equal(sample["reference"], np.full((32, 16, 3), 160))
    assert sample["garment"][16, 8, 0] == 160 and sample["garment"][0, 0, 0] == 255
    assert sample["captions"] == {"dynamic": "She turns.", "static": "A room."}


def test_video_frames_are_prepared_like_the_reference(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (3, 20, 24, 3), np.uint8)
    fitted = sources.fit_frames(frames, (16, 16))
    np.testing.assert_array_equal(fitted[2], images.prepare_training_frame(frames[2], (16, 16)))
    assert sources.fit_frames(frames, (20, 24)) is frames


def test_bad_tables_are_refused_with_the_row(tmp_path):
    good = {"video": "a.mp4", "prompt": PROMPT, "width": "30", "height": "40"}
    for change, expected in [
        ({"video": "../a.mp4"}, "row 2: video is '../a.mp4'; expected a path inside"),
        ({"video": "/etc/a.mp4"}, "expected a path inside"),
        ({"width": ""}, "row 2: column width is missing or empty"),
        ({"video": "..\\a.mp4"}, "expected a path inside"),
        ({"video": "C:\\clips\\a.mp4"}, "expected a path inside"),
        ({"video": "\\\\server\\a.mp4"}, "expected a path inside"),
        ({"height": "tall"}, "row 2: height is 'tall'; expected a whole number from 1 to 1000000"),
        ({"height": "0"}, "row 2: height is '0'; expected a whole number"),
        ({"width": "30.5"}, "row 2: width is '30.5'; expected a whole number"),
        ({"width": "nan"}, "row 2: width is 'nan'; expected a whole number"),
        ({"width": "-30"}, "row 2: width is '-30'; expected a whole number"),
        ({"height": "inf"}, "row 2: height is 'inf'; expected a whole number"),
        ({"height": "1e300"}, "row 2: height is '1e300'; expected a whole number"),
        ({"fps": "nan"}, "row 2: fps is 'nan'; expected a number from 0.01 to 1000"),
        ({"fps": "inf"}, "row 2: fps is 'inf'; expected"),
        ({"fps": "-24"}, "row 2: fps is '-24'; expected"),
        ({"fps": "0"}, "row 2: fps is '0'; expected"),
        ({"fps": "fast"}, "row 2: fps is 'fast'; expected"),
        ({"prompt": "{"}, "row 2: prompt is not JSON"),
    ]:
        write_table(tmp_path, [good, good | change])
        with pytest.raises(SourceError) as caught:
            DirectorySource(tmp_path)
        assert expected in str(caught.value)
    write_table(tmp_path, [])
    with pytest.raises(SourceError, match="no rows"):
        DirectorySource(tmp_path)
    (tmp_path / "second.jsonl").write_text("")
    with pytest.raises(SourceError, match="expected one"):
        DirectorySource(tmp_path)


def test_broken_files_are_value_errors(tmp_path):
    write_table(tmp_path, [write_clip(tmp_path, "a", (40, 30), 90)])
    source = DirectorySource(tmp_path)
    (tmp_path / "a_cloth.png").write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        source.load(0, 5, (32, 16))
    with pytest.raises(ValueError, match="7 frames; 9 are needed"):
        source.load(0, 9, (32, 16))


def test_joined_sources(tmp_path):
    for name, level in (("one", 50), ("two", 200)):
        (tmp_path / name).mkdir()
        write_table(
            tmp_path / name, [write_clip(tmp_path / name, c, (32, 16), level) for c in "ab"]
        )
    source = sources.open_sources([tmp_path / "one", tmp_path / "two"])
    assert isinstance(source, JoinedSource) and len(source) == len(source.sizes) == 4
    levels = [
        int(pickle.loads(pickle.dumps(source)).load(i, 1, (32, 16))["reference"].mean())
        for i in range(4)
    ]
    assert levels == [50, 50, 200, 200]


def test_sources_chosen_by_caption(tmp_path):
    rows = [
        write_clip(tmp_path, name, (32, 16), level)
        for name, level in (("a", 50), ("b", 100), ("c", 200))
    ]
    rows[1]["prompt"] = rows[1]["prompt"].replace("She turns.", "She stands still.")
    write_table(tmp_path, rows)
    source = sources.open_sources(tmp_path)
    turning = MatchingSource(source, "turns|jumps")
    assert len(turning) == len(turning.sizes) == 2
    assert [int(turning.load(i, 1, (32, 16))["reference"].mean()) for i in range(2)] == [50, 200]
    with pytest.raises(SourceError, match="no caption of 3 triplets matches 'flies'"):
        MatchingSource(source, "flies")
    with pytest.raises(SourceError, match="not a regular expression"):
        MatchingSource(source, "(")
    assert turning.captions(1) == {"dynamic": "She turns.", "static": "A room."}
    for name in "abc":  # choosing opens no video
        (tmp_path / f"{name}.mp4").unlink()
    assert len(MatchingSource(source, "still")) == 1


def test_sources_chosen_by_bucket(tmp_path):
    shapes = {"a": (32, 16), "b": (16, 32), "c": (40, 22)}
    write_table(tmp_path, [write_clip(tmp_path, name, size, 90) for name, size in shapes.items()])
    source = DirectorySource(tmp_path)
    tall = BucketSource(source, (64, 32), [(32, 64)])
    assert len(tall) == 2 and tall.sizes.tolist() == [[32, 16], [40, 22]]
    assert [tall.load(index, 1, (8, 8))["seed"] for index in range(2)] == [0, 2]
    assert repr(tall) == f"BucketSource(2 for 64x32 of {source!r})"
    with pytest.raises(
        SourceError, match="no clip of 2 is nearest to 32x64: they are 32x16 to 40x2"
    ):
        BucketSource(tall, (32, 64), [(64, 32)])


def test_every_source_is_one_line(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        clips = [
            write_clip(tmp_path / name, "a", (32, 16), 50),
            write_clip(tmp_path / name, "b", (16, 32), 50),
        ]
        write_table(tmp_path / name, clips)
    one = sources.open_sources(tmp_path / "one")
    assert repr(one) == f"DirectorySource({tmp_path / 'one'}: 2 clips of 16x32 to 32x16)"
    both = sources.open_sources([tmp_path / "one", tmp_path / "two"])
    assert repr(both).startswith(f"JoinedSource(4 records of pixels: [{one!r}, ")
    assert repr(MatchingSource(both, "turns")) == f"MatchingSource(4 with 'turns' of {both!r})"
    assert both.captions(3) == {"dynamic": "She turns.", "static": "A room."}
    loader = Loader(both, LoaderConfig(batch=2, frames=5, buckets=((32, 16),), seed=7))
    assert repr(loader) == (
        f"Loader(batches of 2, 5 frames, seed 7, 2 batches an epoch, of {both!r})"
    )


@pytest.mark.parametrize(
    ("frames", "group", "latents"), [(1, 4, 1), (33, 4, 9), (81, 4, 21), (9, 8, 2), (6, 1, 6)]
)
def test_latent_frames(frames, group, latents):
    assert sources.latent_frames(frames, group) == latents


@pytest.mark.parametrize(("frames", "group"), [(0, 4), (-3, 4), (32, 4), (5, 8), (2, 4)])
def test_frames_that_a_vae_does_not_take(frames, group):
    with pytest.raises(SourceError, match=rf"^{frames} frames; a VAE with {group} frames per"):
        sources.latent_frames(frames, group)


def test_missing_folders(tmp_path):
    with pytest.raises(SourceError, match="no such folder"):
        sources.open_sources(tmp_path / "none")
    with pytest.raises(SourceError, match=r"no dataset_info\.json"):
        sources.open_sources(tmp_path)
    with pytest.raises(SourceError, match="no folder"):
        sources.open_sources([])
    (tmp_path / "dataset_info.json").write_text('{"name": ')
    with pytest.raises(SourceError, match=r"dataset_info\.json or features\.json cannot be read"):
        sources.open_sources(tmp_path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_tables_as_programs_write_them(tmp_path, end, mark):
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips", "a", (40, 30), 90)
    prompt = PROMPT.replace('"', '""')
    lines = [
        "video, prompt , width, height, fps",
        f'clips\\a.mp4, "{prompt}", 30.0, 40 , 8',
        "",
        f'"clips/a.mp4" , "{prompt}" ,30,4e1,',
    ]
    (tmp_path / "table.csv").write_bytes((mark + end.join(lines)).encode())
    source = DirectorySource(tmp_path)
    np.testing.assert_array_equal(source.sizes, [[40, 30]] * 2)
    samples = [source.load(index, 4, (32, 16)) for index in range(2)]
    assert [sample["fps"] for sample in samples] == [8, 16]
    assert all(sample["captions"]["dynamic"] == "She turns." for sample in samples)


def test_json_lines_keep_unusual_characters_and_refuse_numbers_that_are_none(tmp_path):
    row = write_clip(tmp_path, "a", (40, 30), 90)
    row["prompt"] = {"en_long": ["She\u2028turns.", "A\x85room."]}
    table = tmp_path / "table.jsonl"
    table.write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8", newline="")
    assert DirectorySource(tmp_path).captions(0) == {
        "dynamic": "She\u2028turns.",
        "static": "A\x85room.",
    }
    for change in ('"width": NaN', '"width": true', '"height": Infinity', '"fps": -Infinity'):
        table.write_text(json.dumps(row)[:-1] + ", " + change + "}")
        with pytest.raises(SourceError, match=r"row 1: \w+ is .*; expected a"):
            DirectorySource(tmp_path)
    table.write_text(json.dumps(row | {"video": 7}))
    with pytest.raises(SourceError, match="row 1: video is 7; expected a path"):
        DirectorySource(tmp_path)


def test_a_row_with_more_values_than_the_header_is_refused(tmp_path):
    (tmp_path / "table.csv").write_text(
        'video,prompt,width,height\na.mp4,{"en_long": ["a", "b"]},30,40\n'
    )
    with pytest.raises(SourceError, match="row 1 has 5 values, the header 4; put quotes"):
        DirectorySource(tmp_path)


def turned_clip(folder, name: str) -> dict[str, str]:
    """A clip that is stored 32 high and 48 wide, and shown 48 high and 32 wide."""
    row = write_clip(folder, name, (48, 32), 90)
    clip = with_matrix(corners(32, 48), MATRICES["quarter"])
    (folder / f"{name}.mp4").write_bytes(clip)
    return row


def test_buckets_go_by_the_size_that_is_shown(tmp_path):
    row = turned_clip(tmp_path, "a")
    write_table(tmp_path, [row])
    frames = DirectorySource(tmp_path).load(0, 3, (48, 32))["video"]
    assert frames[:, 12, 8, 0].max() > 150 > frames[:, 12, 24, 0].max()  # as with a quarter turn
    # A table that leaves the size out gets it from the clip.
    write_table(tmp_path, [row | {"width": "", "height": ""}])
    np.testing.assert_array_equal(DirectorySource(tmp_path).sizes, [[48, 32]])
    # One that says how the clip is stored brings it into the wrong bucket, which is refused; where
    # there is only the right one it does not matter.
    write_table(tmp_path, [row | {"width": "48", "height": "32"}])
    source = DirectorySource(tmp_path)
    with pytest.raises(
        SourceError, match=r"width 48, height 32, as the clip is stored; it is shown"
    ):
        source.load(0, 3, (32, 48))
    np.testing.assert_array_equal(source.load(0, 3, (48, 32))["video"], frames)


def test_clips_that_cannot_be_opened_count_as_broken_where_the_table_names_no_sizes(tmp_path):
    silent = {"width": "", "height": ""}
    rows = [write_clip(tmp_path, name, (40, 30), 90) | silent for name in "ab"]
    (tmp_path / "a.mp4").write_bytes(b"no video")
    write_table(tmp_path, rows)
    source = DirectorySource(tmp_path)
    np.testing.assert_array_equal(source.sizes, [[40, 30]] * 2)
    with pytest.raises(ValueError, match="not a readable video"):
        source.load(0, 3, (32, 16))
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(
        SourceError, match=r"the table names no sizes, and .*a\.mp4: not a readable"
    ):
        DirectorySource(tmp_path)
