"""Compile the chunk step of the published size for a chip that is not here, and print what comes
out as JSON.

    python tests/aot_compile.py v6e      one TPU v6e chip, through libtpu (pip install 'jax[tpu]')
    python tests/aot_compile.py h200     one NVIDIA H200, through the CUDA plugin (pip install 'jax[cuda13]')

The step is four denoising passes and the clean pass over a chunk of three latent frames at 1280x704
(latent 80x44, 880 tokens a frame) with the paper's cache of 23 frames, in bfloat16. Parameters are
abstract: no memory is used for them.

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

NOT_INSTALLED = 3
TARGETS = {
    "v6e": {"needs": ("libtpu",), "attention": "splash"},
    "h200": {"needs": ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"), "attention": "cudnn"},
}
H200_CONFIG = Path(__file__).parent / "data_files" / "h200_target_config.txt"
GIB = 2**30


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def target_device(target: str):
    """A device to compile for, without having it."""
    from jax.experimental import topologies

    if target == "v6e":
        return topologies.get_topology_desc(
            "v6e:1x1", "tpu", chips_per_host_bounds=[1, 1, 1]
        ).devices[0]
    config = H200_CONFIG.read_text()
    return topologies.get_topology_desc(
        "h200", "cuda", target_config=config, topology="1x1x1"
    ).devices[0]


def lower_chunk_step(device, attention: str, positions: str, layers: int):
    """The jitted step, cache donated, traced for `device`; and the number of elements of a layer's
    K buffer.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from chameleon_jax.attention.policies import Ring
    from chameleon_jax.diffusion import rollout
    from chameleon_jax.models.dit import DiT, DiTConfig

    config = DiTConfig.wan22_ti2v_5b(attention=attention, layers=layers)
    build = lambda: DiT(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)  # noqa: E731
    graph, state = nnx.split(nnx.eval_shape(build))
    policy = Ring(frames=23, context=2, block=3, sink=3, positions=positions)
    cache = jax.eval_shape(lambda: rollout.new_cache(nnx.merge(graph, state), policy, 1, (80, 44)))
    text = jax.ShapeDtypeStruct((1, config.text_length, config.text_width), jnp.bfloat16)
    text_kv = jax.eval_shape(lambda state, text: nnx.merge(graph, state).text_kv(text), state, text)
    sampler = rollout.make_sampler("few_step")

    def step(state, cache, text_kv, seed):
        return rollout.denoise_chunk(
            nnx.merge(graph, state), cache, text_kv, jax.random.key(seed), sampler=sampler
        )

    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (state, cache, text_kv, jax.ShapeDtypeStruct((), jnp.uint32)),
    )
    return jax.jit(step, donate_argnums=1).lower(*arguments), cache.k[0].size


def large_operations(hlo: str, elements: int) -> dict[str, int]:
    """How often each kind of operation makes an array of `elements` elements; updates in place are
    not counted.

    Only what runs as a kernel counts: the insides of fusions and regions of reductions are skipped.
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
            if operation == "fusion":
                called = re.search(r"calls=%?([\w.\-]+)", rest)
                operation = f"fusion:{roots.get(called.group(1), '')}" if called else operation
            if operation.removeprefix("fusion:") not in free:
                counts[operation] += 1
    return dict(counts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--positions", default="absolute", choices=("absolute", "relative"))
    parser.add_argument("--layers", type=int, default=30, help="fewer than 30 to try something out")
    parser.add_argument("--hlo", help="write the compiled program to this file")
    args = parser.parse_args()
    wanted = TARGETS[args.target]
    if not any(installed(name) for name in wanted["needs"]):
        print(
            f"{args.target}: its compiler is not installed ({' or '.join(wanted['needs'])})",
            file=sys.stderr,
        )
        return NOT_INSTALLED

    device = target_device(args.target)
    start = time.perf_counter()
    lowered, layer = lower_chunk_step(device, wanted["attention"], args.positions, args.layers)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    if args.hlo:
        Path(args.hlo).write_text(hlo)
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    report = {
        "target": args.target,
        "trace_seconds": round(traced - start, 1),
        "compile_seconds": round(done - traced, 1),
        "arguments_gib": round(memory.argument_size_in_bytes / GIB, 3),
        "outputs_not_aliased_gib": round(
            (memory.output_size_in_bytes - memory.alias_size_in_bytes) / GIB, 3
        ),
        "temporary_gib": round(memory.temp_size_in_bytes / GIB, 3),
        "program_gib": round(memory.generated_code_size_in_bytes / GIB, 3),
        "total_bytes": total,
        "attention_kernels": len(
            re.findall(r'custom_call_target="(?:__cudnn\$fmhaSoftmax|tpu_custom_call)"', hlo)
        ),
        "cudnn_flash": len(re.findall(r'custom_call_target="__cudnn\$fmhaSoftmax"', hlo)),
        "layer_sized_operations": large_operations(hlo, layer),
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    # Before JAX is imported: this machine's own platform does not matter, and no metadata server is
    # asked for one.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-1")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.exit(main())
