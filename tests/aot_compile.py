"""Compile the chunk step of the published size for another chip, and print a report as JSON.

    python tests/aot_compile.py v6e      one TPU v6e chip; needs pip install 'jax[tpu]'
    python tests/aot_compile.py v5e      one TPU v5e chip, which needs fewer layers
    python tests/aot_compile.py h200     one NVIDIA H200; needs pip install 'jax[cuda13]'

The chip itself need not be in this machine. The step is four denoising passes and the clean pass
over a chunk of three latent frames at 1280x704 (latent 80x44, 880 tokens a frame) with the paper's
cache of 23 frames, in bfloat16. Parameters are abstract: no memory is used for them.

Exit code 3 says that the compiler for the target is not installed.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

NOT_INSTALLED = 3
TARGETS = {
    "v6e": {"needs": ("libtpu",), "attention": "splash"},
    "v5e": {"needs": ("libtpu",), "attention": "splash"},
    "h200": {"needs": ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"), "attention": "cudnn"},
}
H200_CONFIG = Path(__file__).parent / "data_files" / "h200_target_config.txt"
GIB = 2**30


def installed(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def target_device(target: str) -> jax.Device:
    """A description of a chip to compile for."""
    from jax.experimental import topologies

    if target in ("v5e", "v6e"):
        chips = {"chips_per_host_bounds": [1, 1, 1]}
        topology = topologies.get_topology_desc(f"{target}:1x1", "tpu", **chips)
    else:
        config = H200_CONFIG.read_text()
        topology = topologies.get_topology_desc(
            "h200", "cuda", target_config=config, topology="1x1x1"
        )
    return topology.devices[0]


def lower_chunk_step(
    device: jax.Device, attention: str, positions: str, layers: int, eight_bits: str = "none"
) -> tuple[jax.stages.Lowered, int]:
    """Trace the step for a device; the cache is donated.

    Args:
      device: from `target_device`.
      attention, layers: of the transformer.
      positions: of the cache.
      eight_bits: of `QUANTIZE` in weights/quantize.py.

    Returns:
      The program before compilation, and the number of elements of a layer's K buffer.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from chameleon_jax.attention.policies import Ring
    from chameleon_jax.diffusion import rollout
    from chameleon_jax.models.dit import DiT, DiTConfig
    from chameleon_jax.weights.quantize import quantize

    config = DiTConfig.wan22_ti2v_5b(attention=attention, layers=layers)

    def build() -> DiT:
        return DiT(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)

    dit = nnx.eval_shape(build)
    quantize(dit, eight_bits)
    graph, state = nnx.split(dit)
    policy = Ring(frames=23, context=2, block=3, sink=3, positions=positions)

    def new_cache():
        return rollout.new_cache(nnx.merge(graph, state), policy, 1, (80, 44))

    def project_text(state, text):
        return nnx.merge(graph, state).text_kv(text)

    cache = jax.eval_shape(new_cache)
    text = jax.ShapeDtypeStruct((1, config.text_length, config.text_width), jnp.bfloat16)
    text_kv = jax.eval_shape(project_text, state, text)
    sampler = rollout.make_sampler("few_step")

    def step(state, cache, text_kv, seed):
        return rollout.denoise_chunk(
            nnx.merge(graph, state), cache, text_kv, jax.random.key(seed), sampler=sampler
        )

    sharding = jax.sharding.SingleDeviceSharding(device)

    def on_device(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    arguments = jax.tree.map(on_device, (state, cache, text_kv, seed))
    return jax.jit(step, donate_argnums=1).lower(*arguments), cache.k[0].size


def large_operations(hlo: str, elements: int) -> dict[str, int]:
    """How often each kind of operation makes an array of `elements` elements.

    Updates in place do not count, nor do operations inside of fusions and reductions, which do not
    run as kernels of their own.

    Args:
      hlo: text of a compiled program.
      elements: size of the arrays to look for.
    """
    computations = re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \(.*\{\n)", hlo)
    roots, bodies = {}, {}
    for text in computations:
        name = re.match(r"(?:HloModule.*\n)?\s*(?:ENTRY )?%?([\w.\-]+) \(", text)
        if name:
            bodies[name.group(1)] = text
            root = re.search(r"\n\s*ROOT .*? = \S+ ([\w\-]+)\(", text)
            roots[name.group(1)] = root.group(1) if root else ""
    fused = set(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", hlo))
    free = {
        "parameter",
        "get-tuple-element",
        "bitcast",
        "dynamic-update-slice",
        "copy-done",
        "while",
        "tuple",
    }
    counts = collections.Counter()
    for name, text in bodies.items():
        if name in fused:
            continue
        for shape, operation, rest in re.findall(r" = \(?\w+\[([\d,]+)\]\S* ([\w\-]+)\((.*)", text):
            if math.prod(int(n) for n in shape.split(",")) != elements:
                continue
            called = re.search(r"calls=%?([\w.\-]+)", rest)
            if operation == "fusion" and called:
                operation = f"fusion:{roots.get(called.group(1), '')}"
            if operation.removeprefix("fusion:") not in free:
                counts[operation] += 1
    return dict(counts)


PRODUCT = re.compile(r" = (\w+)\[[\d,]*\]\S* (?:dot|convolution)\(([^)]*)\)")


def products(hlo: str) -> dict[str, int]:
    """How often each pair of types is multiplied, and into which: "s8 x s8 -> s32".

    TPU compilers write products as convolutions.

    Args:
      hlo: text of a compiled program.
    """
    types = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", hlo))
    types |= dict(re.findall(r"([\w.\-]+): (\w+)\[", hlo))
    counts = collections.Counter()
    for made, operands in PRODUCT.findall(hlo):
        names = re.findall(r"%?([\w.\-]+)(?:,|$)", operands)
        pair = " x ".join(types.get(name, "?") for name in names)
        counts[f"{pair} -> {made}"] += 1
    return dict(counts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--positions", default="absolute", choices=("absolute", "relative"))
    parser.add_argument("--layers", type=int, default=30, help="fewer than 30 to try something out")
    parser.add_argument("--quantize", default="none", choices=("none", "int8", "fp8"))
    parser.add_argument("--hlo", help="write the compiled program to this file")
    args = parser.parse_args()
    wanted = TARGETS[args.target]
    if not any(installed(name) for name in wanted["needs"]):
        needed = " or ".join(wanted["needs"])
        print(f"{args.target}: its compiler is not installed ({needed})", file=sys.stderr)
        return NOT_INSTALLED

    device = target_device(args.target)
    start = time.perf_counter()
    lowered, layer = lower_chunk_step(
        device, wanted["attention"], args.positions, args.layers, args.quantize
    )
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    if args.hlo:
        Path(args.hlo).write_text(hlo)
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    new_outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    program = memory.generated_code_size_in_bytes
    cudnn_flash = len(re.findall(r'custom_call_target="__cudnn\$fmhaSoftmax"', hlo))
    tpu_kernels = len(re.findall(r'custom_call_target="tpu_custom_call"', hlo))
    report = {
        "target": args.target,
        "trace_seconds": round(traced - start, 1),
        "compile_seconds": round(done - traced, 1),
        "arguments_gib": round(arguments / GIB, 3),
        "outputs_not_aliased_gib": round(new_outputs / GIB, 3),
        "temporary_gib": round(temporary / GIB, 3),
        "program_gib": round(program / GIB, 3),
        "total_bytes": arguments + new_outputs + temporary + program,
        "attention_kernels": cudnn_flash + tpu_kernels,
        "cudnn_flash": cudnn_flash,
        "products": products(hlo),
        "layer_sized_operations": large_operations(hlo, layer),
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    # Before JAX is imported: this machine's own devices do not matter, and libtpu need not ask a
    # metadata server what they are.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # No chip is used, so another process may have loaded libtpu too.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    accelerator = "v5litepod-1" if "v5e" in sys.argv else "v6e-1"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", accelerator)
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.exit(main())
