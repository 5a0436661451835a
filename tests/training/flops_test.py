"""The counter of operations against numbers by hand, and against XLA where XLA counts right."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from chameleon_jax import sharding
from chameleon_jax.attention.core import attention
from chameleon_jax.attention.policies import Ring
from chameleon_jax.models.dit import bidirectional_forward, teacher_forcing_forward
from chameleon_jax.training import flops, optim
from chameleon_jax.training.flops import Flops
from tests import tiny_dit

X = jnp.ones((3, 4))
W = jnp.ones((4, 4))
PRODUCT = 2 * 3 * 4 * 4  # X @ W


def dit_inputs():
    """Two clips of 2 + 3 latent frames, 6 tokens each, with 12 tokens of text."""
    shapes = ((2, 2, *tiny_dit.LATENT, 4), (2, 3, *tiny_dit.LATENT, 4), (2, 3), (2, 12, 16))
    return tuple(jnp.ones(shape) for shape in shapes)


def dit_loss(dit):
    graph, state = nnx.split(dit)

    def loss(state, context, z, t, text):
        module = nnx.merge(graph, state)
        v = bidirectional_forward(module, context, z, t, module.text_kv(text))
        return jnp.square(v).mean()

    return loss, state


def block_by_hand(b, tokens, text):
    """A block without the keys and values of the text."""
    m, ffn = tiny_dit.CONFIG.width, tiny_dit.CONFIG.ffn
    linear = 2 * b * tokens * (6 * m * m + 2 * m * ffn)  # q, k, v, o; q, o; two of the feed-forward
    return linear + 4 * b * tokens * (tokens + text) * m


def dit_by_hand():
    b, frames, text, layers, m = 2, 5, 12, 2, tiny_dit.CONFIG.width
    patch, tokens = 2 * 2 * 4, frames * tiny_dit.TOKENS
    embedding = 2 * b * tokens * patch * m
    prompt = 2 * b * text * (16 * m + m * m + layers * 2 * m * m)
    times = 2 * b * frames * (32 * m + m * m + m * 6 * m)
    head = 2 * b * 3 * tiny_dit.TOKENS * m * patch
    return embedding + prompt + times + layers * block_by_hand(b, tokens, text) + head


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_transformer_by_hand_forward_and_backward(scan_layers):
    loss, state = dit_loss(tiny_dit.tiny_dit(scan_layers=scan_layers))
    forward = flops.count(loss, state, *dit_inputs())
    assert forward == Flops(dit_by_hand(), dit_by_hand())
    every_gradient = flops.count(jax.grad(loss, argnums=(0, 1, 2, 3, 4)), state, *dit_inputs())
    assert every_gradient == Flops(3 * dit_by_hand(), 3 * dit_by_hand())


@pytest.fixture(params=["remat", "remat3"])
def checkpoints(request):
    """Both ways in which JAX can implement `jax.checkpoint`; versions differ in their choice."""
    if request.param == "remat3" and not hasattr(jax.config, "jax_remat3"):
        pytest.skip("this version has one way")
    former = getattr(jax.config, "jax_remat3", None)
    if former is not None:
        jax.config.update("jax_remat3", request.param == "remat3")
    yield
    if former is not None:
        jax.config.update("jax_remat3", former)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_what_a_checkpoint_computes_again_is_not_of_the_model(scan_layers, checkpoints):
    gradients = {}
    for remat in (False, True):
        loss, state = dit_loss(tiny_dit.tiny_dit(remat=remat, scan_layers=scan_layers))
        gradients[remat] = flops.count(jax.grad(loss), state, *dit_inputs())
    assert gradients[True].model == gradients[False].model == gradients[False].hardware
    # All of a block: the gradient of its last gate needs its last product.
    again = tiny_dit.CONFIG.layers * block_by_hand(2, 5 * tiny_dit.TOKENS, 12)
    assert gradients[True].hardware == gradients[True].model + again
    assert not gradients[True].unknown
    alone = flops.count(loss, state, *dit_inputs())
    assert alone.model == alone.hardware > 0 and not alone.unknown


def test_teacher_forcing_costs_what_its_mask_leaves():
    """Two blocks after two condition frames; no clean block but the first is seen by another."""
    dit = tiny_dit.tiny_dit()
    policy = Ring(frames=8, context=2, block=3, sink=0, positions="relative")
    graph, state = nnx.split(dit)

    def forward(state, context, z, t, text_kv):
        return teacher_forcing_forward(
            nnx.merge(graph, state), context, z, z, t, text_kv, policy=policy
        )

    b, p, m, layers = 2, tiny_dit.TOKENS, tiny_dit.CONFIG.width, tiny_dit.CONFIG.layers
    context, z = (jnp.ones((b, n, *tiny_dit.LATENT, 4)) for n in (2, 6))
    text_kv = dit.text_kv(jnp.ones((b, 12, 16)))
    counted = flops.count(forward, state, context, z, jnp.ones((b, 6)), text_kv).hardware
    # Queries x keys, in frames: the condition, the clean block, the two noisy ones.
    seen = 2 * 2 + 3 * 5 + 3 * 5 + 3 * 8
    frames = 2 + 3 + 6
    linear = frames * p * (16 * m + layers * (6 * m * m + 2 * m * tiny_dit.CONFIG.ffn + 2 * 12 * m))
    times = frames * (32 * m + m * m + m * 6 * m)
    by_hand = 2 * b * (linear + times + 6 * p * m * 16) + layers * 4 * b * seen * p * p * m
    assert counted == by_hand


def test_a_dense_step_agrees_with_xla():
    """XLA counts elementwise work as well: next to nothing in wide layers."""
    params = [jnp.ones((256, 512)), jnp.ones((512, 256))]
    x = jnp.ones((512, 256))
    optimizer = optax.sgd(0.1)

    def step(params, x):
        def loss(params):
            return jnp.square(jax.nn.relu(x @ params[0]) @ params[1]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, _ = optimizer.update(grads, optimizer.init(params))
        return optax.apply_updates(params, updates), value

    counted = flops.count(step, params, x)
    assert counted.hardware == 5 * 2 * 512 * 256 * 512  # no gradient of x
    xla = jax.jit(step).lower(params, x).compile().cost_analysis()["flops"]
    np.testing.assert_allclose(counted.hardware, xla, rtol=0.02)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 4])
def test_convolutions_agree_with_xla(stride, groups):
    """Forward, and backward to the input (dilated) and to the kernel (strided taps)."""
    x, kernel = jnp.ones((2, 9, 12, 16)), jnp.ones((3, 3, 16 // groups, 64))

    def conv(x, kernel):
        y = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), [(2, 0), (1, 1)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        )  # fmt: skip
        return jnp.square(y).sum()

    for function in (conv, jax.grad(conv, argnums=0), jax.grad(conv, argnums=1)):
        xla = jax.jit(function).lower(x, kernel).compile().cost_analysis()["flops"]
        np.testing.assert_allclose(flops.count(function, x, kernel).hardware, xla, rtol=0.04)


def test_loops_branches_and_calls():
    def scanned(x):
        return jax.lax.scan(lambda x, _: (x @ W, None), x, length=5)[0]

    def chosen(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ W @ W, lambda x: x @ W, x)

    @jax.custom_vjp
    def custom(x):
        return x @ W

    custom.defvjp(lambda x: (x @ W, None), lambda _, g: (g @ W @ W,))
    assert flops.count(scanned, X).model == 5 * PRODUCT
    assert flops.count(chosen, X).model == 2 * PRODUCT
    assert flops.count(lambda x: jax.jit(custom)(x), X).model == PRODUCT
    assert flops.count(jax.grad(lambda x: custom(x).sum()), X).model == 3 * PRODUCT


def test_a_loop_of_unknown_length_is_said_if_there_is_a_product_in_it():
    def loop(body):
        return lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 100, body, x)

    counted = flops.count(lambda x: loop(lambda x: x @ W)(x) @ W, X)
    assert counted == Flops(PRODUCT, PRODUCT, frozenset({"while"}))
    assert flops.count(loop(lambda x: x + 1), X) == Flops()


def test_a_loop_of_drawn_length_counts_by_its_mean():
    def loop(n, x):
        with flops.times(2.5):
            x = jax.lax.fori_loop(0, n, lambda _, x: x @ W, x)
        return jax.lax.stop_gradient(x)

    counted = Flops(2.5 * PRODUCT, 2.5 * PRODUCT)
    assert flops.count(loop, 3, X) == counted
    assert flops.count(jax.vmap(loop, (None, 0)), 3, X[None]) == counted
    differentiated = jax.grad(lambda w: (jax.jit(loop)(3, X) @ w).sum())
    assert flops.count(differentiated, W) == counted + Flops(PRODUCT, PRODUCT).times(2)

    def inner(n, x):  # a loop of unknown length inside stays unknown
        with flops.times(2.5):
            return jax.lax.fori_loop(0, 2, lambda _, x: jax.lax.fori_loop(0, n, step, x), x)

    def step(_, x):
        return x @ W

    assert flops.count(inner, 3, X).unknown == {"while"}


def test_linear_algebra_is_not_passed_over():
    assert flops.count(jnp.linalg.inv, W).unknown
    assert flops.count(jnp.linalg.cholesky, W).unknown == {"cholesky"}


def test_the_parts_of_a_shard_map_are_all_counted():
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    automatic = (jax.sharding.AxisType.Auto,) * 2
    abstract = jax.sharding.AbstractMesh((3, 4), ("a", "b"), axis_types=automatic)
    for over, parts in ((mesh, 1), (abstract, 12)):
        axis = P(over.axis_names[0])
        split = jax.shard_map(lambda x: x @ W, mesh=over, in_specs=axis, out_specs=axis)
        rows = 3 // over.shape[over.axis_names[0]]
        assert flops.count(split, X).model == parts * 2 * rows * 4 * 4


def test_muon_multiplies_matrices():
    params = {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(3)}
    settings = {"b1": 0.9, "b2": 0.9, "eps": 1e-8, "weight_decay": 0.0, "clip": 0.0}
    optimizer = optim.make_optimizer(
        ConfigDict({"name": "muon", "momentum": 0.95, **settings}), lambda step: 1e-3
    )
    counted = flops.count(optimizer.update, params, optimizer.init(params), params)
    # Five steps of Newton and Schulz: x x^T, its square, and that times x.
    assert counted == Flops(*(2 * [5 * 2 * (8 * 8 * 16 + 8**3 + 8 * 8 * 16)]))


@pytest.fixture
def qkv():
    """Whole tiles and lanes: splash attention adds nothing to them."""
    q, k = (jnp.ones((2, tokens, 3, 128), jnp.bfloat16) for tokens in (128, 256))
    return q, k, k


EACH = 2 * 2 * 128 * 256 * 3 * 128  # one product of queries, keys and channels


def gradients(function):
    return jax.grad(lambda *qkv: function(*qkv).astype(jnp.float32).sum(), argnums=(0, 1, 2))


def test_splash_attention_from_its_shapes(qkv):
    def splash(q, k, v):
        return attention(q, k, v, backend="splash")

    assert flops.count(splash, *qkv) == Flops(2 * EACH, 2 * EACH)
    found = flops.count(gradients(splash), *qkv)
    assert not found.unknown
    row_sums = 2 * 2 * 3 * 128 * 128  # of out times its gradient, beside the kernels
    assert (found.model, found.hardware) == (6 * EACH + row_sums, 9 * EACH + row_sums)


def test_cudnn_attention_from_its_shapes(qkv, monkeypatch):
    """Traced without a GPU, for which JAX is told that there is one."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)

    def fused(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

    assert flops.count(fused, *qkv) == Flops(2 * EACH, 2 * EACH)
    assert flops.count(gradients(fused), *qkv) == Flops(6 * EACH, 7 * EACH)


def test_another_kernel_is_unknown_unless_it_says_what_it_costs():
    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] @ x_ref[...].T

    def call(**more):
        out = jax.ShapeDtypeStruct((8, 8), jnp.float32)
        return lambda x: pl.pallas_call(kernel, out_shape=out, name="mystery", **more)(x)

    x = jnp.ones((8, 128))
    assert flops.count(call(), x) == Flops(unknown=frozenset({"mystery"}))
    cost = pl.CostEstimate(flops=2 * 8 * 8 * 128, transcendentals=0, bytes_accessed=0)
    assert flops.count(call(cost_estimate=cost), x) == Flops(16384, 16384)
    assert flops.count(jax.vmap(call(cost_estimate=cost)), x[None].repeat(5, 0)).model == 5 * 16384
