"""Text states: what is stored is what the encoder made, and is found by the prompt."""

from __future__ import annotations

import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.data import sources
from chameleon_jax.data.loader import DataError, Loader
from chameleon_jax.data.shards import ShardError
from chameleon_jax.data.text_states import (
    TextError,
    TextExamples,
    TextStates,
    read_prompts,
    write_text_states,
)
from tests.data.loader_test import SIZE, NumberSource, config, take

WIDTH, LENGTH = 6, 12


class Encoder:
    """States that depend on the prompt, made of numbers that bfloat16 does not hold exactly."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts):
        self.calls.append(list(prompts))
        lengths = np.array([min(LENGTH, 1 + len(prompt.split())) for prompt in prompts])
        mask = np.arange(LENGTH) < lengths[:, None]
        states = np.zeros((len(prompts), LENGTH, WIDTH), np.float32)
        for row, prompt in enumerate(prompts):
            seed = sum(map(ord, prompt))
            states[row] = np.random.default_rng(seed).normal(size=(LENGTH, WIDTH))
        return jnp.asarray(states * mask[..., None]), mask


def examples(prompts, encode=None, **changes) -> TextExamples:
    values = {"dtype": "float32", "weights": "w", "tokenizer": "t", "batch": 4} | changes
    return TextExamples(prompts, encode or Encoder(), WIDTH, LENGTH, **values)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_come_back_to_the_bit(tmp_path, dtype):
    prompts = ["", "walks", "walks in a red room", "女 ü", "a" * 5000, "w " * 40]
    assert write_text_states(tmp_path, "train", examples(prompts, dtype=dtype), shard_size=4) == 6
    states = TextStates(tmp_path)
    assert (len(states), states.width, states.length) == (6, WIDTH, LENGTH)
    assert (states.weights, states.tokenizer, states.dtype) == ("w", "t", dtype)
    expected, _ = Encoder()(prompts)
    found = pickle.loads(pickle.dumps(states)).batch(prompts)
    assert found.dtype == jnp.dtype(dtype) and found.shape == (6, LENGTH, WIDTH)
    np.testing.assert_array_equal(found, np.asarray(expected.astype(dtype)))
    assert "walks" in states and "runs" not in states
    with pytest.raises(TextError, match="has no states of the prompt 'runs'; `prepare text` adds"):
        states.states("runs")
    made = [record["states"] for _, record in examples(prompts, dtype=dtype)(range(6))]
    assert [len(kept) for kept in made] == [1, 2, 6, 3, 2, LENGTH]  # no padding is stored


def test_a_set_goes_on_where_it_was_and_grows(tmp_path):
    prompts = [f"walks {index} steps" for index in range(10)]

    def stop(done, found, total):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_text_states(tmp_path, "train", examples(prompts), shard_size=4, progress=stop)
    with pytest.raises(TextError, match="the set is not finished"):
        TextStates(tmp_path)
    again = Encoder()
    write_text_states(tmp_path, "train", examples(prompts, again), shard_size=4)
    assert again.calls == [prompts[4:8], [*prompts[8:], "", ""]]
    more = Encoder()
    write_text_states(tmp_path, "train", examples([*prompts, "sits"], more), shard_size=4)
    assert more.calls == [["sits", "", "", ""]]
    write_text_states(tmp_path, "validation", examples(["", "stands"]))
    states = TextStates(tmp_path)
    assert all(prompt in states for prompt in [*prompts, "sits", "stands", ""])
    for changed in ({"weights": "x"}, {"tokenizer": "x"}, {"dtype": "bfloat16"}):
        with pytest.raises(ValueError, match=f"made otherwise .*{next(iter(changed))}: "):
            write_text_states(tmp_path, "train", examples(prompts, **changed))
    with pytest.raises(ValueError, match="are not those that split train was made from"):
        write_text_states(tmp_path, "train", examples(["runs", *prompts, "sits"]))


def test_prompts_of_a_source_are_all_that_the_loader_can_draw(tmp_path):
    class Half(NumberSource):
        def captions(self, index):
            if index == 2:
                raise sources.SourceError("record 2 is damaged")
            return super().captions(index % 3)

    assert read_prompts(Half([SIZE] * 5), ("", "bad")) == [
        "",
        "bad",
        "dynamic 0",
        "dynamic 0 static 0",
        "dynamic 1",
        "dynamic 1 static 1",
    ]


@pytest.mark.parametrize("captions", ["mixed", "full", "dynamic"])
def test_the_loader_gives_the_states_of_the_prompts_that_it_draws(tmp_path, captions):
    source = NumberSource([SIZE] * 20)
    write_text_states(tmp_path, "train", examples(read_prompts(source, [""])))
    how = config(frames=1, captions=captions, dropout=0.4)
    plain = take(iter(Loader(source, how)), 8)
    states = TextStates(tmp_path)
    stored = take(iter(Loader(source, how, text=states)), 8)
    for with_prompt, with_text in zip(plain, stored, strict=True):
        assert with_prompt["prompt"] == with_text["prompt"]
        np.testing.assert_array_equal(with_text["text"], states.batch(with_prompt["prompt"]))
        np.testing.assert_array_equal(with_prompt["video"], with_text["video"])
    drawn = [prompt for batch in plain for prompt in batch["prompt"]]
    assert "" in drawn and any(drawn)


def test_captions_that_were_not_encoded_stop_the_run(tmp_path):
    write_text_states(tmp_path, "train", examples(["", "dynamic 0"]))
    loader = Loader(NumberSource([SIZE] * 8), config(), text=TextStates(tmp_path))
    with pytest.raises(DataError, match="has no states of the prompt 'dynamic"):
        take(iter(loader), 2)


def test_damaged_states_are_a_broken_record(tmp_path):
    source = NumberSource([SIZE] * 120)
    write_text_states(tmp_path, "train", examples(read_prompts(source, [""])), shard_size=1000)
    states = TextStates(tmp_path)

    class Damaged(TextStates):
        def states(self, prompt):
            if prompt == "dynamic 7":
                raise ShardError("the shard is damaged")
            return super().states(prompt)

    batches = iter(Loader(source, config(frames=1, captions="dynamic"), text=Damaged(tmp_path)))
    taken = take(batches, 60)
    assert batches.broken == {7: "the shard is damaged"}
    for batch in taken:
        np.testing.assert_array_equal(batch["text"], states.batch(batch["prompt"]))


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(TextError, match=r"no dataset_info\.json in it; expected text states"):
        TextStates(tmp_path)
    write_text_states(tmp_path / "text", "train", examples(["", "walks"]))
    with pytest.raises(sources.SourceError, match="holds text states and no clips; give it as"):
        sources.open_sources(tmp_path / "text")
    (tmp_path / "text" / "prompts.train.txt").unlink()
    with pytest.raises(TextError, match="not a list of the prompts"):
        TextStates(tmp_path / "text")
    with pytest.raises(TextError, match="dtype is 'float16'; expected one of bfloat16, float32"):
        examples([""], dtype="float16")
    no_numbers = np.full((4, LENGTH, WIDTH), np.nan)
    broken = examples(["walks"], lambda prompts: (no_numbers, np.ones((4, LENGTH), bool)))
    with pytest.raises(TextError, match="the states of the prompt 'walks' are not finite"):
        write_text_states(tmp_path / "bad", "train", broken)
