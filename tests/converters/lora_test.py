"""LoRAs: every naming in and out, in diffusers and PEFT too, merged and kept apart."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from chameleon_jax.models.dit import bidirectional_forward
from chameleon_jax.weights.lora import (
    Change,
    Lora,
    attach,
    detach,
    lora_params,
    merge,
    parse_strength,
)
from chameleon_jax.weights.params import flat_params
from chameleon_jax.weights.tensors import WeightsError, read_tensors
from converters import lora
from converters.recognise import RecognitionError, recognise
from converters.rules import ConversionError, Rule, rename
from tests import tiny_dit, tiny_wan
from tests.commands import run_converter

LAYERS = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.fc1", "text_embedding.fc2")
KERNELS = {
    name: x.shape for name, x in flat_params(tiny_dit.tiny_dit()).items() if name.endswith("kernel")
}


def run(*arguments) -> None:
    run_converter(*arguments)


def changes(seed: int = 0, dtype=np.float32) -> dict[str, Change]:
    """Ranks and alphas that differ from layer to layer."""
    rng = np.random.default_rng(seed)
    made = {}
    for i, layer in enumerate(LAYERS):
        inputs, outputs = KERNELS[f"{layer}.kernel"]
        a, b = rng.standard_normal((inputs, 2 + i)), rng.standard_normal((2 + i, outputs))
        made[layer] = Change(
            (0.3 * a).astype(dtype), (0.3 * b).astype(dtype), (4.0, 4.0, 8.0, 2.0)[i]
        )
    return made


def save(path: Path, layout: str, **kw) -> Path:
    tensors, metadata = lora.to_layout(changes(**kw), layout)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: as_torch(x) for name, x in tensors.items()}, path, metadata)
    if layout == "peft":
        (path.parent / "adapter_config.json").write_text(
            json.dumps(lora.adapter_config(changes(**kw), layout))
        )
    return path


def as_torch(x) -> torch.Tensor:
    return torch.from_numpy(np.array(x, order="C"))


def assert_same(a, b) -> None:
    assert a.keys() == b.keys()
    for layer in a:
        assert a[layer].alpha == b[layer].alpha, layer
        np.testing.assert_array_equal(a[layer].a, b[layer].a)
        np.testing.assert_array_equal(a[layer].b, b[layer].b)


@pytest.mark.parametrize("layout", ["peft", "diffusers", "official", "kohya"])
def test_every_naming_comes_in_and_goes_out_bit_for_bit(tmp_path, layout):
    path = save(tmp_path / "in/lora.safetensors", layout)
    (part,) = recognise([path])
    assert part.layout == layout
    assert_same(part.changes, changes())
    run(path, "--to", "jax", "--out", tmp_path / "ours")
    assert_same(Lora.load(tmp_path / "ours/lora.safetensors").changes, changes())
    run(tmp_path / "ours", "--to", layout, "--out", tmp_path / "back")
    (back,) = recognise([tmp_path / "back"])
    assert back.layout == layout
    assert_same(back.changes, changes())
    written = read_tensors(next((tmp_path / "back").glob("*.safetensors")))
    original = read_tensors(path)
    assert written.keys() == original.keys()
    assert all(np.array_equal(written[name], x) for name, x in original.items())


def test_names_are_those_that_the_others_use(tmp_path):
    expected = {
        "peft": "base_model.model.blocks.0.self_attn.q.lora_A.weight",
        "diffusers": "transformer.blocks.0.attn1.to_q.lora_A.weight",
        "official": "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
        "kohya": "lora_unet_blocks_0_self_attn_q.lora_down.weight",
    }
    for layout, name in expected.items():
        tensors = lora.to_layout(changes(), layout)[0]
        assert tensors[name].shape == (2, 60)  # [r, in], as torch has it
    assert float(lora.to_layout(changes(), "kohya")[0]["lora_unet_blocks_1_ffn_0.alpha"]) == 8.0


def test_spellings_that_others_mix_are_read(tmp_path):
    """`lora_down` behind dotted names, PEFT's adapter name, halves in bfloat16, a training
    checkpoint's prefix.
    """
    tensors = lora.to_layout(changes(), "official")[0]
    mixed = {}
    for name, x in tensors.items():
        name = name.replace("diffusion_model.", "generator_lora.base_model.model.")
        mixed[
            name.replace(".lora_A.weight", ".lora_A.default.weight").replace(
                ".lora_B.", ".lora_up."
            )
        ] = x
    save_file({name: as_torch(x) for name, x in mixed.items()}, tmp_path / "x.safetensors")
    (part,) = recognise([tmp_path / "x.safetensors"])
    assert_same(part.changes, changes())
    torch.save({name: as_torch(x) for name, x in mixed.items()}, tmp_path / "x.pt")
    (part,) = recognise([tmp_path / "x.pt"])
    assert_same(part.changes, changes())


NAMINGS = {
    "kohya's with dots": "lora_unet_{}.lora_down.weight",
    "lycoris": "lycoris_{_}.lora_down.weight",
    "DiffSynth": "pipe.dit.{}.lora_A.default.weight",
    "unet": "unet.{}.lora_down.weight",
    "dit": "dit.{}.lora_A.weight",
    "the adapter's name": "base_model.model.{}.lora_A.style_7.weight",
    "doubled": "diffusion_model.diffusion_model.{}.lora_A.weight",
    "doubled, of PEFT": "base_model.model.base_model.model.{}.lora_A.weight",
    "several": "base_model.model.transformer.{}.lora_A.default.weight",
    "kohya's of diffusers": "lora_transformer_{_}.lora_down.weight",
    "none": "{}.lora_down.weight",
    "old diffusers": "transformer.{}.lora_linear_layer.down.weight",
    "without weight": "{}.lora_A",
}


@pytest.mark.parametrize("table", ["official", "diffusers"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_the_names_of_other_trainers_are_read(tmp_path, naming, table):
    """Each for the layers of the original code and for those of diffusers; alphas of shape [1]."""
    rules = [Rule(rule.target, rule.source) for rule in lora.module_rules(table)]
    modules = {layer: name for layer, (name, _) in rename(LAYERS, rules)[0].items()}
    tensors = {}
    for layer, change in changes().items():
        name = NAMINGS[naming].replace("{}", modules[layer])
        first = name.replace("{_}", modules[layer].replace(".", "_"))
        second = first.replace("lora_A", "lora_B").replace("down", "up")
        module = lora.HALF.fullmatch(first)["module"]
        tensors |= {first: change.a.T, second: change.b.T}
        tensors[f"{module}.alpha"] = np.float32([change.alpha])
    save_file({name: as_torch(x) for name, x in tensors.items()}, tmp_path / "x.safetensors")
    (part,) = recognise([tmp_path / "x.safetensors"])
    assert_same(part.changes, changes())


def test_of_several_adapters_in_a_file_one_is_chosen(tmp_path):
    tensors = {}
    for seed, adapter in enumerate(("first", "second")):
        for name, x in lora.to_layout(changes(seed), "peft")[0].items():
            tensors[name.replace(".weight", f".{adapter}.weight")] = x
    save_file({name: as_torch(x) for name, x in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="several adapters: first, second; convert one"):
        recognise([tmp_path / "x.safetensors"])
    (part,) = recognise([tmp_path / "x.safetensors"], "second")
    np.testing.assert_array_equal(part.changes[LAYERS[0]].a, changes(1)[LAYERS[0]].a)


def test_a_layer_that_is_changed_twice_is_refused(tmp_path):
    tensors = lora.to_layout(changes(), "official")[0]
    twice = {name.replace("diffusion_model.", "unet."): x for name, x in tensors.items()}
    save_file({k: as_torch(x) for k, x in (tensors | twice).items()}, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match="matched twice: blocks.0.self_attn.q"):
        recognise([tmp_path / "x.safetensors"])


@pytest.mark.parametrize("layout", ["peft", "diffusers", "official", "kohya", "jax"])
@pytest.mark.parametrize("where", ["a", "b", "alpha"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_lora_that_is_not_finite_is_refused_by_name(tmp_path, layout, where, bad):
    broken = changes()
    one = broken[LAYERS[2]]
    if where == "alpha":
        one = dataclasses.replace(one, alpha=bad)
    else:
        getattr(one, where)[1, 1] = bad
    broken[LAYERS[2]] = one
    tensors, metadata = lora.to_layout(broken, layout)
    path = tmp_path / "x.safetensors"
    save_file({name: as_torch(x) for name, x in tensors.items()}, path, metadata)
    if layout == "peft":
        settings = json.dumps(lora.adapter_config(broken, layout))
        (tmp_path / "adapter_config.json").write_text(settings)
    part = "alpha" if where == "alpha" else f"lora_{where}"
    with pytest.raises(WeightsError, match=rf"{LAYERS[2]}\.{part}: not finite") as error:
        recognise([path])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "", "strong"])
def test_a_strength_that_is_no_finite_number_is_refused(tmp_path, text):
    with pytest.raises(WeightsError, match="is not a strength; expected a number"):
        parse_strength(f"{tmp_path}/x.safetensors@{text}")
    assert parse_strength("x.safetensors@-0.5") == (Path("x.safetensors"), -0.5)


@pytest.mark.parametrize("strength", [np.nan, np.inf, 1e300])
def test_a_strength_that_is_not_finite_changes_nothing(strength):
    dit = tiny_dit.tiny_dit()
    before = flat_params(dit)
    for function in (merge, attach):
        with pytest.raises(WeightsError, match="is not a finite factor"):
            function(dit, Lora(changes()), strength)
    assert all(np.array_equal(x, before[name]) for name, x in flat_params(dit).items())


def test_of_a_training_checkpoint_with_two_the_generators_is_taken_unless_the_other_is_named(
    tmp_path,
):
    """As LongLive-2.0 saves them, in dictionaries."""
    stored = {}
    for seed, part in enumerate(("generator_lora", "critic_lora")):
        stored[part] = {
            name: as_torch(x) for name, x in lora.to_layout(changes(seed), "official")[0].items()
        }
        stored[part] = {
            name.replace("diffusion_model.", "base_model.model."): x
            for name, x in stored[part].items()
        }
    torch.save(stored | {"step": 3}, tmp_path / "x.pt")
    for wanted, seed in ((None, 0), ("generator", 0), ("critic", 1), ("critic_lora", 1)):
        (part,) = recognise([tmp_path / "x.pt"], wanted)
        assert_same(part.changes, changes(seed))
    with pytest.raises(
        WeightsError, match="no part 'teacher_lora'; it has critic_lora, generator_lora"
    ):
        recognise([tmp_path / "x.pt"], "teacher")


def test_without_an_alpha_the_product_counts_once(tmp_path):
    tensors = {
        k: v for k, v in lora.to_layout(changes(), "official")[0].items() if not k.endswith("alpha")
    }
    save_file({name: as_torch(x) for name, x in tensors.items()}, tmp_path / "x.safetensors")
    (part,) = recognise([tmp_path / "x.safetensors"])
    assert all(change.alpha == change.rank for change in part.changes.values())


def _forward(dit) -> np.ndarray:
    text_kv = dit.text_kv(tiny_dit.prompt())
    return np.asarray(
        bidirectional_forward(dit, None, tiny_dit.latents(1, 3), jnp.full((1, 3), 500.0), text_kv)
    )


def test_kept_apart_computes_what_merged_computes_and_comes_off_again():
    plain, merged, apart = (tiny_dit.tiny_dit() for _ in range(3))
    adapter = Lora(changes())
    merge(merged, adapter, 0.7)
    attach(apart, adapter, 0.7)
    before, expected = _forward(plain), _forward(merged)
    assert np.abs(expected - before).max() > 0.1
    np.testing.assert_allclose(_forward(apart), expected, atol=1e-4)
    assert len(lora_params(apart)) == 2 * len(LAYERS)
    kernel = (
        flat_params(merged)["blocks.0.self_attn.q.kernel"]
        - flat_params(plain)["blocks.0.self_attn.q.kernel"]
    )
    change = changes()["blocks.0.self_attn.q"]
    np.testing.assert_allclose(kernel, 0.7 * 4 / 2 * change.a @ change.b, atol=1e-6)
    with pytest.raises(WeightsError, match="attached already"):
        attach(apart, adapter)
    detach(apart)
    assert not lora_params(apart)
    np.testing.assert_array_equal(_forward(apart), before)


def test_a_lora_of_another_network_is_refused_with_every_fault():
    adapter = dict(changes())
    adapter["blocks.7.ffn.fc1"] = adapter["blocks.1.ffn.fc1"]
    adapter["blocks.0.ffn.fc2"] = adapter["blocks.1.ffn.fc1"]
    dit = tiny_dit.tiny_dit()
    before = _forward(dit)
    for function in (merge, attach):
        with pytest.raises(WeightsError) as error:
            function(dit, Lora(adapter))
        assert "there is no layer blocks.7.ffn.fc1" in str(
            error.value
        ) and "blocks.0.ffn.fc2 is (96, 60)" in str(error.value)
    np.testing.assert_array_equal(_forward(dit), before)  # nothing was changed


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "diffusers"
    tiny_wan.pipeline().save_pretrained(folder)
    return folder


def test_merged_by_the_converter_it_is_what_diffusers_fuses(base, tmp_path):
    """diffusers' own loader reads our export: names, ranks and alphas by way of the header."""
    save(tmp_path / "lora/lora.safetensors", "kohya")
    run(tmp_path / "lora/lora.safetensors", "--to", "diffusers", "--out", tmp_path / "theirs")
    run(
        base / "transformer",
        "--lora",
        f"{tmp_path / 'lora/lora.safetensors'}@0.7",
        "--to",
        "diffusers",
        "--out",
        tmp_path / "ours",
    )
    pipeline = WanPipeline.from_pretrained(base)
    pipeline.load_lora_weights(tmp_path / "theirs", weight_name="pytorch_lora_weights.safetensors")
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unload_lora_weights()
    ours = read_tensors(tmp_path / "ours/transformer/diffusion_pytorch_model.safetensors")
    plain = read_tensors(base / "transformer/diffusion_pytorch_model.safetensors")
    fused = pipeline.transformer.state_dict()
    assert ours.keys() == fused.keys()
    for name, x in fused.items():
        np.testing.assert_allclose(ours[name], x.numpy(), atol=1e-6)
    assert sum(not np.array_equal(ours[name], plain[name]) for name in ours) == len(LAYERS)


def test_what_peft_saves_is_read_and_computes_the_same(base, tmp_path):
    model = WanTransformer3DModel.from_pretrained(base / "transformer")
    wrapped = get_peft_model(
        model,
        LoraConfig(
            r=3,
            lora_alpha=6,
            target_modules=["to_q", "ffn.net.2"],
            rank_pattern={"blocks.1.attn2.to_q": 5},
            alpha_pattern={"blocks.1.attn2.to_q": 20},
            init_lora_weights=False,
        ),
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    (part,) = recognise([tmp_path / "adapter"])
    assert part.layout == "diffusers" and len(part.changes) == 6
    assert (
        part.changes["blocks.1.cross_attn.q"].rank,
        part.changes["blocks.1.cross_attn.q"].alpha,
    ) == (5, 20.0)
    expected = {k: v.numpy() for k, v in get_peft_model_state_dict(wrapped).items()}
    np.testing.assert_array_equal(
        part.changes["blocks.0.ffn.fc2"].a.T,
        expected["base_model.model.blocks.0.ffn.net.2.lora_A.weight"],
    )
    run(
        base / "transformer",
        "--lora",
        tmp_path / "adapter",
        "--to",
        "diffusers",
        "--out",
        tmp_path / "ours",
    )
    merged = wrapped.merge_and_unload().state_dict()
    for name, x in read_tensors(
        tmp_path / "ours/transformer/diffusion_pytorch_model.safetensors"
    ).items():
        np.testing.assert_allclose(x, merged[name].numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("diffusion_model.blocks.0.self_attn.q.dora_scale", "this is DoRA; only plain LoRA"),
        ("lora_unet_blocks_0_self_attn_q.hada_w1_a", "this is LoHa"),
        (
            "diffusion_model.blocks.0.self_attn.q.lora_B.weight",
            "missing: diffusion_model.blocks.0.self_attn.q.lora_A",
        ),
        (
            "diffusion_model.down_blocks.0.lora_A.weight",
            "unexpected: diffusion_model.down_blocks.0",
        ),
    ],
)
def test_other_kinds_and_halves_are_refused_by_name(tmp_path, name, message):
    tensors = {} if "lora_B" in name else lora.to_layout(changes(), "official")[0]
    tensors[name] = np.ones((60, 2), np.float32)
    save_file({key: as_torch(x) for key, x in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises((WeightsError, ConversionError), match=message):
        recognise([tmp_path / "x.safetensors"])


def test_a_lora_without_a_transformer_or_of_another_size_is_refused(base, tmp_path):
    path = save(tmp_path / "lora.safetensors", "official")
    with pytest.raises(RecognitionError, match="no transformer"):
        run(base / "vae", "--lora", path, "--to", "jax", "--out", tmp_path / "out")
    wide = {
        "blocks.0.self_attn.q": Change(
            np.ones((5120, 4), np.float32), np.ones((4, 5120), np.float32), 4.0
        )
    }
    tensors = lora.to_layout(wide, "official")[0]
    save_file({key: as_torch(x) for key, x in tensors.items()}, tmp_path / "wide.safetensors")
    with pytest.raises(
        ConversionError, match=r"blocks.0.self_attn.q is \(60, 60\), the LoRA changes \(5120, 4\)"
    ):
        run(
            base / "transformer",
            "--lora",
            tmp_path / "wide.safetensors",
            "--to",
            "jax",
            "--out",
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()
