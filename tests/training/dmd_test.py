"""The distillation stage: what its steps change, what they look at, and its kinds of roll-out."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.config import ConfigError, load_config
from chameleon_jax.training import flops
from chameleon_jax.training.stages import dmd, dmd_setup, rollouts
from chameleon_jax.training.stages.dmd_setup import Kind

PLAIN, LONG, SWITCHED = Kind(0, 0), Kind(1, 0), Kind(1, 1)
TEXTS = [f"A person in garment {i}. Walks {i} steps." for i in range(20)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from chameleon_jax.data import tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.train_pieces(TEXTS, 300).save(str(path))
    return path


def settings(tokenizer, *overrides: str):
    """Weights are named, and never read here."""
    named = [f"weights.{name}=unread" for name in ("vae", "text", "score")]
    small = ["video.height=16", "video.width=16", "train.preview_every=0"]
    rest = [f"data.tokenizer={tokenizer}", "workdir=x", "data.dir=y", "init_from=unread"]
    return load_config("configs/dmd.py:smoke", [*rest, *named, *small, *overrides])


def random_params(nets, seed: int):
    """All networks; none of them says zero, as a new head would."""
    rng, params = np.random.default_rng(seed), {}
    for name, network in sorted(nets.items()):
        params[name] = {}
        for path, leaf in network.shapes.items():
            noise = rng.standard_normal(leaf.shape)
            if len(leaf.shape) > 1:
                value = noise * np.prod(leaf.shape[:-1]) ** -0.5
            else:
                value = 0.1 * noise + (not path.endswith("bias"))
            params[name][path] = jnp.asarray(value, leaf.dtype)
    return params


def random_batch(config, chunks: int = 2):
    z = jax.random.normal(jax.random.key(1), (2, 2 + 3 * chunks, 2, 2, 4))
    ids = jax.random.randint(jax.random.key(2), (2, config.model.text.length), 3, 200)
    return {
        "z_reference": z[:, :1],
        "z_garment": z[:, 1:2],
        "z_video": z[:, 2:],
        "ids": ids,
        "mask": jnp.ones(ids.shape, bool),
    }


@pytest.fixture(scope="module")
def plain(tokenizer):
    """A stage, its parameters and a batch."""
    config = settings(tokenizer)
    parts = dmd.Distillation(config)
    params = random_params({**parts.nets.trained, **parts.nets.frozen}, 0)
    return parts, params, random_batch(config)


def taken(config, name: str, poisoned: str = ""):
    """One step of a stage: the state before and after, and the metrics."""
    stage = dmd.make_stage(config)
    trained, frozen = random_params(stage.trained, 0), random_params(stage.frozen, 100)
    if poisoned:
        frozen[poisoned] = jax.tree.map(lambda p: p * jnp.nan, frozen[poisoned])
    state = stage.init(trained)
    step = jax.jit(stage.steps[name])
    after, metrics = step(state, frozen, random_batch(config))
    return stage, frozen, state, after, metrics


def changed(before, after) -> bool:
    return any(
        bool((a != b).any())
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )


def test_the_critic_alone_learns_and_never_sees_pixels(tokenizer):
    """With a VAE that gives nothing but NaN; a switch needs it."""
    config = settings(tokenizer)
    _, _, state, after, metrics = taken(config, "critic", poisoned="vae")
    assert np.isfinite(metrics["critic/loss"])
    assert changed(state["critic"].params, after["critic"].params)
    assert not changed(state["generator"], after["generator"])
    assert int(after["critic"].step) == 1 and int(after["generator"].step) == 0
    _, _, _, _, switched = taken(config, "critic 1+1", poisoned="vae")
    assert np.isnan(switched["critic/loss"])


@pytest.mark.slow
def test_both_learn_in_a_step_of_the_student(tokenizer):
    _, _, state, after, metrics = taken(settings(tokenizer), "both 1+1")
    for name in ("generator", "critic"):
        assert changed(state[name].params, after[name].params)
        assert int(after[name].step) == 1
    assert changed(state["generator"].ema, after["generator"].ema) and not after["critic"].ema
    expected = {"generator/loss", "generator/grad_norm", "critic/loss", "critic/grad_norm"}
    expected |= {"dmd/ratio", "dmd/cosine", "x/mean", "x/std", "x/motion_ratio", "learning_rate"}
    expected |= {"reward/mean", "reward/chunk_00", "reward/chunk_01"}
    assert expected <= metrics.keys() and all(np.isfinite(v) for v in metrics.values())
    # No first moment: beta1 is 0.
    moments = [m for m in jax.tree.leaves(after["generator"].opt_state) if m.ndim]
    size = sum(m.size for m in moments)
    assert size == sum(p.size for p in jax.tree.leaves(after["generator"].params))


@pytest.mark.parametrize("name", ["critic", "both 1+1"])
def test_the_operations_of_a_step_are_counted(tokenizer, name):
    """Though the length of a roll-out is drawn: it counts by its mean."""
    config = settings(tokenizer)
    stage = dmd.make_stage(config)
    trained, frozen = (
        jax.eval_shape(lambda nets=nets: random_params(nets, 0))
        for nets in (stage.trained, stage.frozen)
    )
    state, batch = jax.eval_shape(stage.init, trained), random_batch(config)
    counted = flops.count(stage.steps[name], state, frozen, batch)
    assert not counted.unknown and counted.model > 0


def test_steps_come_in_turn(tokenizer):
    """A step of the student in every second one, of the two kinds in turn."""
    stage = dmd.make_stage(settings(tokenizer))
    names = [stage.next_step(number) for number in range(5)]
    assert names == ["both", "critic", "both 1+1", "critic 1+1", "both"]


def test_a_student_that_the_critic_cannot_tell_from_the_teacher_stays(plain):
    """Equal scores pull nowhere: no loss, no gradient."""
    parts, params, batch = plain
    equal = params | {"real": params["critic"]}
    fixed = {name: value for name, value in equal.items() if name != "generator"}
    parts.negative, guided = None, parts.negative  # guidance would make them differ

    def loss(student):
        return parts.generator_loss(PLAIN, {"generator": student}, fixed, batch, jax.random.key(3))

    try:
        differentiate = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (value, metrics), grads = differentiate(equal["generator"])
    finally:
        parts.negative = guided
    assert value == 0 and metrics["dmd/ratio"] == 0
    assert all((grad == 0).all() for grad in jax.tree.leaves(grads))


def test_after_a_switch_the_reference_is_the_last_frame_in_another_garment(plain):
    parts, params, batch = plain
    vae = parts.nets.bind("vae", params)
    made = jax.jit(functools.partial(parts.make, kind=SWITCHED))(
        params=params, batch=batch, key=jax.random.key(4)
    )
    np.testing.assert_array_equal(made.z_context[:, 1], batch["z_garment"][::-1, 0])
    # The first part is a stream with all steps from the batch's own conditions.
    key = jax.random.fold_in(dmd.loss_key(jax.random.key(4), "before"), 0)
    context = jnp.concatenate([batch["z_reference"], batch["z_garment"]], axis=1)
    exits = rollouts.last_exits(parts.sampler, 1)
    first = jax.jit(
        lambda: parts._roll_out(params, context, made.text_kv, key, exits),
    )()
    expected = rollouts.last_frame(vae, first.z)
    np.testing.assert_allclose(made.z_context[:, :1], expected, atol=1e-4)
    assert jnp.abs(made.z_context[:, :1] - batch["z_reference"]).max() > 0.01
    assert made.rollout.z.shape[1] == 6


def test_with_anchor_the_persons_picture_comes_back_behind_the_first_chunk(plain):
    """After each of two switches, the second of which goes on from a stream with anchor."""
    parts, params, batch = plain
    changes = {"rollout.anchor": True, "scores.causal": True, "rollout.kinds": ((2, 2),)}
    config = parts.config
    for name, value in changes.items():
        config = _changed(config, name, value)
    anchored, key = dmd.Distillation(config), jax.random.key(4)
    made = jax.jit(functools.partial(anchored.make, kind=Kind(2, 2)))(
        params=params, batch=batch, key=key
    )
    # Two samples: after two switches each wears its own garment again.
    np.testing.assert_array_equal(made.z_context[:, 0], batch["z_reference"][:, 0])
    for context in (made.z_context, made.z_opening):
        np.testing.assert_array_equal(context[:, 1], batch["z_garment"][:, 0])

    def part(number, z_context, z_opening=None):
        own = jax.random.fold_in(dmd.loss_key(key, "before"), number)
        exits = rollouts.last_exits(anchored.sampler, 2)
        run = functools.partial(anchored._roll_out, params, text_kv=made.text_kv, exits=exits)
        made_z = jax.jit(lambda: run(z_context=z_context, key=own, z_opening=z_opening))().z
        return rollouts.last_frame(anchored.nets.bind("vae", params), made_z)

    person, garment = batch["z_reference"], batch["z_garment"]
    frame = part(0, jnp.concatenate([person, garment], 1))
    changed = garment[::-1]
    frame = part(
        1, jnp.concatenate([person, changed], 1), jnp.concatenate([frame, changed], axis=1)
    )
    np.testing.assert_allclose(made.z_opening[:, :1], frame, atol=1e-4)
    # The scores see the clip with the same two contexts.
    clip, free = anchored.clip_of(params, made, made.rollout.z)
    assert clip.z_opening is made.z_opening and (free == 1).all()


def test_the_middle_of_a_stream_becomes_a_clip(plain):
    """Its first latent is of one picture, the last one shown by then, and has no gradient."""
    parts, params, batch = plain
    made = jax.jit(functools.partial(parts.make, kind=LONG))(
        params=params, batch=batch, key=jax.random.key(5)
    )
    assert made.rollout.z.shape[1] == 9
    x = made.rollout.z[:, -6:]
    clip, free = parts.clip_of(params, made, x)
    np.testing.assert_array_equal(free, [0, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(clip.z[:, 1:], x[:, 1:])
    vae = parts.nets.bind("vae", params)
    np.testing.assert_allclose(clip.z[:, :1], rollouts.last_frame(vae, made.rollout.z[:, :4]))
    assert jnp.abs(clip.z[:, 0] - x[:, 0]).max() > 0.01
    # Causal scores see the stream itself.
    causal = dmd.Distillation(_changed(parts.config, "scores.causal", True))
    clip, free = causal.clip_of(params, made, x)
    np.testing.assert_array_equal(free, 1)
    np.testing.assert_array_equal(clip.history, made.rollout.z)
    np.testing.assert_array_equal(clip.z, x)


def _changed(config, key, value):
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict({key: value})
    return config


@pytest.mark.slow
@pytest.mark.parametrize("step", ["critic", "both 1+0"])
def test_causal_scores(tokenizer, step):
    """Of a whole stream from its start, and of the end of a longer one."""
    config = settings(tokenizer, "scores.causal=true", "rollout.kinds=((0,0),(1,0))")
    _, _, state, after, metrics = taken(config, step)
    assert all(np.isfinite(value) for value in metrics.values())
    for name in ("critic",) if step == "critic" else ("generator", "critic"):
        assert changed(state[name].params, after[name].params)


@pytest.mark.slow
def test_a_student_learns_streams_with_anchor(tokenizer):
    extra = "rollout.anchor=true", "rollout.history_noise=0.3"
    config = settings(tokenizer, "scores.causal=true", *extra)
    _, _, state, after, metrics = taken(config, "both 1+1")
    assert all(np.isfinite(value) for value in metrics.values())
    for name in ("generator", "critic"):
        assert changed(state[name].params, after[name].params)


@pytest.mark.slow
def test_heads_on_the_critic(tokenizer):
    """They learn with the critic; their pull on the student is as long as asked for."""
    config = settings(tokenizer, "gan.layers=(0,1)", "gan.weight=0.5", "rollout.kinds=((0,0),)")
    _, _, state, after, metrics = taken(config, "both")
    assert changed(state["critic"].params["heads"], after["critic"].params["heads"])
    assert 0 <= metrics["critic/heads_right"] <= 1 and np.isfinite(metrics["gan/generator"])
    parts = dmd.Distillation(config)
    params = random_params({**parts.nets.trained, **parts.nets.frozen}, 0)
    batch, key = random_batch(config), jax.random.key(6)

    @jax.jit
    def lengths():
        made = parts.make(params, PLAIN, batch, key)
        clip, _ = parts.clip_of(params, made, made.rollout.z)
        noised = parts.noised(clip.z, key)
        g = dmd.dmd_loss.dmd_gradient(clip.z, *parts.compare(params, batch, clip, noised))
        push, _ = parts._adversarial_gradient(params, batch, clip, noised, g)
        return jnp.sqrt(jnp.square(g).sum()), jnp.sqrt(jnp.square(push).sum())

    of_scores, of_heads = lengths()
    np.testing.assert_allclose(of_heads, 0.5 * of_scores, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"gan\.layers has \[7\]; expected numbers from 0 to 1"):
        dmd.Distillation(settings(tokenizer, "gan.layers=(7,)"))


@pytest.mark.slow
def test_a_lora_for_both_lies_on_weights_that_are_there_once(tokenizer):
    config = settings(tokenizer, "tune.mode=lora", "tune.rank=2", "rollout.kinds=((0,0),)")
    stage, frozen, state, after, _ = taken(config, "both")
    assert {"generator_fixed", "real"} <= frozen.keys() and "critic_fixed" not in frozen
    for name in ("generator", "critic"):
        params = after[name].params[name]
        assert all(path.endswith(("lora_a", "lora_b")) for path in params)
        assert changed(state[name].params, after[name].params)
    files = stage.exported(after, frozen)
    assert set(files) == {"dit", "lora"}
    assert set(files["dit"]) == set(frozen["generator_fixed"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("weights.score=", r"weights\.score: not set; distillation starts from"),
        (
            "rollout.kinds=((0,1),)",
            r"rollout\.kinds has \(0, 1\); a switch needs at least one chunk",
        ),
        (
            "rollout.kinds=((0,),)",
            r"rollout\.kinds has the entry \(0,\); expected \(chunks in front",
        ),
        ("rollout.anchor=true", r"rollout\.anchor needs scores\.causal=True"),
        ("rollout.history_noise=0.3", r"history_noise is 0\.3, and rollout\.anchor is not set"),
        ("rollout.exit=last", "rollout.exit is 'last'; expected shared"),
        ("rollout.kinds=((0,0),(0,0))", "expected different kinds"),
        ("data.batch=1", "a batch has one clip: the new garment is that of another one"),
        ("streaming.sampler.name=euler", "sampler.timesteps: the sampler 'euler' has no such"),
        ("reward.name=beauty", "reward.name is 'beauty'; expected aesthetic, sharpness, or"),
        ("reward.name=no.such:thing", "it cannot be imported"),
    ],
)
def test_what_cannot_be_is_named(tokenizer, override, message):
    with pytest.raises(ConfigError, match=message):
        dmd.make_stage(settings(tokenizer, override))


def test_an_anchor_without_a_switch_is_refused(tokenizer):
    overrides = "scores.causal=true", "rollout.anchor=true", "rollout.kinds=((0,0),(1,0))"
    with pytest.raises(ConfigError, match=r"rollout\.anchor is set, and rollout\.kinds is"):
        dmd.make_stage(settings(tokenizer, *overrides))


def test_any_function_of_frames_is_a_reward(tokenizer):
    config = settings(tokenizer, "reward.name=tests.training.dmd_test:redness")
    parts = dmd.Distillation(config)
    frames = jnp.zeros((1, 2, 4, 4, 3), jnp.uint8).at[0, 1, ..., 0].set(200)
    np.testing.assert_allclose(parts.reward.score({}, frames), [[0, 200]])


def redness(frames):
    return frames[..., 0].astype(jnp.float32).mean(axis=(-2, -1))


def test_kinds_are_read(tokenizer):
    config = settings(tokenizer, "rollout.kinds=((0,0),(3,0),(1,2))")
    assert dmd_setup.read_kinds(config) == (Kind(0, 0), Kind(3, 0), Kind(1, 2))
    assert [kind.suffix for kind in dmd_setup.read_kinds(config)] == ["", " 3+0", " 1+2"]
