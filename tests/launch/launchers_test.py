"""The launchers of clusters: they can be read, and call the training command with flags it has."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from chameleon_jax.config import load_config
from launch import bench, cli, evaluate, prepare, train

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = ("train_slurm.sh", "train_tpu_pod.sh")


def check_command(words: list[str]) -> cli.Values:
    """The flags are known, and the config with its overrides can be loaded."""
    values = cli.read(train.define_flags, words)
    load_config(values.config, values.overrides)
    return values


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_commands_in_the_comments_work(name):
    text = (LAUNCH / name).read_text()
    comment = "\n".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    (command,) = re.findall(r"launch/train_\w+\.sh .*?(?=\n\n|\nStart|\nOn)", comment, re.DOTALL)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[0] == f"launch/{name}"
    check_command(["--distributed", *words[1:]])


def run_script(name: str, tmp_path: Path, stand_ins: dict[str, str], *arguments: str):
    """Run a launcher with stand-ins for the programs of the cluster."""
    for program, body in stand_ins.items():
        file = tmp_path / program
        file.write_text(f"#!/usr/bin/env bash\n{body}\n")
        file.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    env |= {"TPU": "slice", "ZONE": "zone", "FOLDER": str(tmp_path)}
    command = ["bash", str(LAUNCH / name), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("code", "again"), [(0, False), (2, False), (75, True), (143, True)])
def test_slurm_queues_again_what_the_machine_has_ended(tmp_path, code, again):
    stand_ins = {"srun": f'echo "srun $*"; exit {code}', "scontrol": 'echo "scontrol $*"'}
    done = run_script("train_slurm.sh", tmp_path, stand_ins, "--config.workdir=a b")
    assert done.returncode == code
    assert "-m launch.train --distributed --config.workdir=a b" in done.stdout
    assert ("scontrol requeue 7" in done.stdout) == again


def test_a_tpu_slice_starts_again_after_a_loss(tmp_path):
    """`gcloud` runs the remote command here; the first Python is lost, the second one fails."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    stand_ins = {
        "gcloud": 'while [ "$1" != --command ]; do shift; done; bash -c "$2"',
        "sleep": "true",
        ".venv/bin/python": 'echo "$*|"; if [ -e seen ]; then exit 2; fi; touch seen; exit 75',
    }
    done = run_script("train_tpu_pod.sh", tmp_path, stand_ins, "--config.workdir=a b")
    assert done.returncode == 2, done.stderr
    assert done.stdout.count("-m launch.train --distributed --config.workdir=a b|") == 2
    assert done.stdout.count("exit code 75: starting again") == 1


def test_kubernetes():
    sets = list(yaml.safe_load_all((LAUNCH / "train_gke.yaml").read_text()))
    assert [item["metadata"]["labels"]["accelerator"] for item in sets] == ["tpu-v6e", "h200"]
    for item in sets:
        (job,) = item["spec"]["replicatedJobs"]
        spec = job["template"]["spec"]
        assert spec["parallelism"] == spec["completions"]
        pod = spec["template"]["spec"]
        (container,) = pod["containers"]
        assert "launch.train" in " ".join(container["command"])
        words = [*container["args"]]
        if "JOB_COMPLETION_INDEX" in container["command"][2]:
            words.append("--process_id=0")
        values = check_command(words)
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        if values.coordinator:
            name = item["metadata"]["name"]
            assert values.coordinator.split(":")[0] == f"{name}-{job['name']}-0-0.{name}"
            assert values.processes == spec["parallelism"]
        else:
            assert values.distributed
        (rule,) = spec["podFailurePolicy"]["rules"]
        assert rule["onExitCodes"]["values"] == [1, 2]
        assert rule["onExitCodes"]["containerName"] == container["name"]


# In the place of Python: notes what it is called with, and leaves what such a run would leave.
PYTHON_THAT_NOTES = """#!/usr/bin/env bash
if [[ "$1" == - ]]; then exec python3 "$@"; fi
printf '%s\\n' "$@" --- >> "$NOTES"
for word in "$@"; do
    case "$word" in
        --config.workdir=*) work=${word#*=} ;;
        --config.train.steps=*) steps=${word#*=} ;;
        --judge) [[ " $* " == *" judge "* ]] && touch "$WORK/judge/export/judge.json" ;;
    esac
done
if [[ "$2" == launch.train ]]; then
    mkdir -p "$work/export"
    if [[ -n "$SLOW" && ! -e "$work/metrics.jsonl" ]]; then steps=1; fi
    echo "{\\"step\\": $steps}" >> "$work/metrics.jsonl"
fi
"""


def run_mirror(tmp_path: Path, *arguments: str, slow: bool = False):
    """`train_mirror.sh`; returns what it did and the commands that it called."""
    python, notes = tmp_path / "python", tmp_path / "notes"
    python.write_text(PYTHON_THAT_NOTES)
    python.chmod(0o755)
    notes.write_text("")
    env = os.environ | {"PYTHON": str(python), "NOTES": str(notes)}
    env |= {"WORK": str(tmp_path / "work"), "SLOW": "yes" if slow else ""}
    command = ["bash", str(LAUNCH / "train_mirror.sh"), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    calls = [part.split("\n") for part in notes.read_text().split("---\n") if part]
    return done, [[word for word in call if word] for call in calls]


@pytest.mark.parametrize("size", ["toy", "laptop", "gpu"])
def test_the_mirror_is_trained_by_commands_that_exist(tmp_path, size):
    done, calls = run_mirror(tmp_path, size)
    assert done.returncode == 0, done.stderr
    defined = {
        "launch.train": train.define_flags,
        "launch.evaluate": evaluate.define_flags,
        "launch.prepare": prepare.latents_flags,
    }
    trained, folders = [], set()
    for _, module, *words in calls:
        if module == "launch.prepare":
            assert words.pop(0) == "latents"
        values = cli.read(defined[module], words)
        if module == "launch.train":
            config = load_config(values.config, values.overrides)
            assert config.video.frames in (1, 5, 9, 33) and config.train.max_minutes == 8
            assert config.train.steps > 0 and config.dtype == (
                "bfloat16" if size == "gpu" else "float32"
            )
            for needed in (config.init_from, *config.weights.values()):
                assert not needed or needed in folders
            trained.append(Path(config.workdir).name)
            folders.add(f"{config.workdir}/export")
    order = ["vae", "stills", "starts", "clips", "teacher", "consistency", "dmd", "judge"]
    assert trained == order
    again, calls = run_mirror(tmp_path, size)
    assert again.returncode == 0 and all(call[1] != "launch.train" for call in calls)


def test_the_mirror_is_trained_in_pieces(tmp_path):
    for stage in ("vae", "stills"):
        done, calls = run_mirror(tmp_path, "toy", "vae", "stills", slow=True)
        assert done.returncode == 75 and f"{stage} is not finished" in done.stdout
        assert f"/{stage}" in " ".join(calls[-1])
    done, _ = run_mirror(tmp_path, "toy", "vae", "stills", slow=True)
    assert done.returncode == 0 and "done: vae stills" in done.stdout
    done, _ = run_mirror(tmp_path, "huge")
    assert done.returncode == 2 and "expected toy, laptop or gpu" in done.stderr


def test_the_mirror_is_trained_by_the_clock(tmp_path, monkeypatch):
    monkeypatch.setenv("BUDGET", "stills=3 clips=.5")
    monkeypatch.setenv("VAE_WEIGHTS", "weights/vae")
    stages = ("vae", "latents_starts", "stills", "starts", "latents_clips", "clips")
    done, calls = run_mirror(tmp_path, "gpu", *stages)
    assert done.returncode == 0, done.stderr
    trained = {}
    for _, module, *words in calls:
        if module == "launch.train":
            values = cli.read(train.define_flags, words)
            config = load_config(values.config, values.overrides)
            trained[Path(config.workdir).name] = config
            assert config.weights.vae == "weights/vae"
        else:
            assert "weights/vae" in words
    minutes = {name: config.train.max_minutes for name, config in trained.items()}
    assert minutes == {"stills": 3, "starts": 8, "clips": 0.5}
    rates = {name: config.schedule.name for name, config in trained.items()}
    assert rates == {"stills": "constant", "starts": "linear", "clips": "constant"}
    again, calls = run_mirror(tmp_path, "gpu", *stages)
    assert again.returncode == 0 and all(call[1] == "launch.prepare" for call in calls)


@pytest.mark.parametrize("budget", ["still=3", "stills", "stills=long", "latents=2"])
def test_a_budget_of_no_stage_is_refused(tmp_path, monkeypatch, budget):
    monkeypatch.setenv("BUDGET", budget)
    done, calls = run_mirror(tmp_path, "gpu", "stills")
    assert done.returncode == 2 and not calls
    assert f"BUDGET has '{budget}'; expected STAGE=MINUTES" in done.stderr


# In the place of Python: notes what it is called with, and fails if that names $FAILS.
PYTHON_THAT_FAILS = """#!/usr/bin/env bash
printf '%s\\n' "$@" "flags:$XLA_FLAGS" --- >> "$NOTES"
[[ -z "$FAILS" || "$*" != *"/$FAILS.json"* ]] || exit 3
"""


def run_h200(tmp_path: Path, *arguments: str, **settings: str):
    """`bench_h200.sh`; returns what it did and the commands that it called."""
    python, notes = tmp_path / "python", tmp_path / "notes"
    python.write_text(PYTHON_THAT_FAILS)
    python.chmod(0o755)
    notes.write_text("")
    env = os.environ | {"PYTHON": str(python), "NOTES": str(notes), "FAILS": "", "XLA_FLAGS": "a"}
    env |= {"OUT": str(tmp_path / "out"), **settings}
    command = ["bash", str(LAUNCH / "bench_h200.sh"), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    calls = [part.split() for part in notes.read_text().split("---\n") if part]
    return done, calls


@pytest.mark.parametrize("size", ["5b", "toy"])
def test_the_benchmark_of_a_gpu_calls_what_exists(tmp_path, size):
    done, calls = run_h200(tmp_path, size)
    assert done.returncode == 0, done.stderr
    groups = []
    for words in calls:
        assert words[:2] == ["-m", "launch.bench"]
        flags = next(place for place, word in enumerate(words) if word.startswith("flags:"))
        values = cli.read(bench.define_flags, words[2:flags])
        load_config(values.config, values.overrides)
        groups.append(bench.chosen_groups(values))
    assert groups == [["start", "denoise", "decode"], ["delivered", "latency"], ["decode"]]
    assert "--xla_gpu_force_conv_nhwc=true" in calls[2]
    assert not any("nhwc" in word for words in calls[:2] for word in words)


def test_a_part_of_the_benchmark_that_fails_does_not_end_it(tmp_path):
    done, calls = run_h200(tmp_path, "toy", FAILS="throughput")
    assert done.returncode == 3 and len(calls) == 3
    assert "throughput: ended with code 3" in done.stderr


def test_the_benchmark_of_a_gpu_leaves_out_what_it_has_no_time_for(tmp_path):
    done, calls = run_h200(tmp_path, "toy", LIMIT="5")
    assert done.returncode == 0 and not calls
    assert "throughput: left out, no time is left" in done.stdout
    _, calls = run_h200(tmp_path, "toy", LIMIT="120")
    assert len(calls) == 2


def test_the_benchmark_of_a_gpu_refuses_another_size(tmp_path):
    done, calls = run_h200(tmp_path, "b200")
    assert done.returncode == 2 and not calls and "expected 5b or toy" in done.stderr


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_at_the_toy_size(tmp_path):
    env = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "LEAST": "10000"}
    done = subprocess.run(
        ["bash", str(LAUNCH / "bench_h200.sh"), "toy"],
        env=env,
        cwd=LAUNCH.parent,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr
    figures = {}
    for name in ("throughput", "latency"):
        report = json.loads((tmp_path / f"{name}.json").read_text())
        figures |= report["figures"]
        assert "median" in (tmp_path / f"{name}.txt").read_text()
    assert {"start_cold_s", "denoise_fps", "with_vae_fps", "with_small_fps"} <= figures.keys()
    assert {"delivered_vae_fps", "first_frame_ms", "switch_ms"} <= figures.keys()
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
