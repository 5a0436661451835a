#!/usr/bin/env bash
# Train the embedded model: people before the mirror of a fitting room, from nothing to a student
# that streams, and the judge that measures it.
#
#     launch/train_mirror.sh toy             every stage for a few steps: does all of it work here?
#     launch/train_mirror.sh laptop          two cores, tens of hours
#     launch/train_mirror.sh gpu             one large GPU and its host, tens of minutes
#     launch/train_mirror.sh gpu vae starts  only these stages
#
# With a VAE that is good already, `python -m launch.sprint --config configs/sprint.py:h200` trains
# stills, starts and clips in one process and in minutes of one large GPU: no starts of
# processes, nothing on disk between, compiled ahead if wanted. The embedded model was trained so.
#
# Stages, in order: vae latents stills starts clips teacher consistency dmd judge bench. The stage
# latents can also be had in two, latents_starts and latents_clips: stills and starts need the first
# only, so that clips may be rendered while those are trained.
#
# Each goes on where it stopped and is left out once it is done, so the script can be stopped and
# called again at any time. No piece of training takes longer than $MINUTES (default 8); while some
# stage is not finished the exit code is 75: call it again. Everything lies under $WORK (default
# runs/mirror). Settings of a stage can be changed, for instance
# STILLS="--config.train.steps=20000".
#
# Where the clock decides, not the number of steps, BUDGET says minutes for stages, compiling
# included: BUDGET="stills=3 starts=2 clips=5". Such a stage keeps its rate of learning, ends when
# its time is over, and is done then; what it exports is the average of its weights. VAE_WEIGHTS
# names a VAE that is good already: the stage vae is left out then. Ten minutes of one GPU:
#
#     export VAE_WEIGHTS=chameleon_jax/assets/runway_tiny BUDGET="stills=3 starts=2 clips=3"
#     launch/train_mirror.sh gpu latents_starts
#     launch/train_mirror.sh gpu latents_clips & launch/train_mirror.sh gpu stills starts
#     wait; launch/train_mirror.sh gpu clips
set -euo pipefail

SIZE=${1:?toy, laptop or gpu}
shift
STAGES=${*:-vae latents stills starts clips teacher consistency dmd judge bench}
WORK=${WORK:-runs/mirror}
MINUTES=${MINUTES:-8}
PYTHON=${PYTHON:-.venv/bin/python}
TOKENIZER=${TOKENIZER:-chameleon_jax/assets/runway_tiny/tokenizer.json}
START=${START:-} # weights of a VAE to go on with; empty: random ones
VAE_WEIGHTS=${VAE_WEIGHTS:-$WORK/vae/export}
BUDGET=${BUDGET:-}
AGAIN=75

case "$SIZE" in
    toy)
        CLIPS=12 STARTS=16 SCENES=16 SCENARIOS=6 WORKERS=2 HELD=8
        declare -A STEPS=([vae]=4 [stills]=6 [starts]=4 [clips]=4 [teacher]=4 [consistency]=4 [dmd]=6 [judge]=6)
        COMMON="--config.train.log_every=1 --config.train.eval_every=4 --config.train.preview_every=4 --config.train.eval_batches=1"
        LONG="--config.data.lengths=((9,2),(33,2)) ${LONG:-}"
        TEACHER="--config.data.batch=2 ${TEACHER:-}"
        CONSISTENCY="--config.data.batch=2 ${CONSISTENCY:-}"
        DMD="--config.data.batch=2 ${DMD:-}"
        ;;
    laptop)
        CLIPS=3000 STARTS=8000 SCENES=6000 SCENARIOS=128 WORKERS=2 HELD=64
        declare -A STEPS=([vae]=4000 [stills]=4000 [starts]=3000 [clips]=3000 [teacher]=800 [consistency]=1200 [dmd]=1000 [judge]=3000)
        COMMON="--config.train.log_every=25 --config.train.eval_every=250 --config.train.preview_every=250"
        ;;
    gpu)
        CLIPS=2500 STARTS=6000 SCENES=4000 SCENARIOS=128 WORKERS=$(nproc) HELD=64
        declare -A STEPS=([vae]=6000 [stills]=6000 [starts]=3000 [clips]=2000 [teacher]=600 [consistency]=600 [dmd]=600 [judge]=2000)
        # Two processes may share the GPU: one that trains and one that encodes.
        export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.4}
        COMMON="--config.dtype=bfloat16 --config.train.log_every=50 --config.train.eval_every=500 --config.train.preview_every=1000"
        VAE="--config.data.crops=((17,64,64,32),(33,48,48,32),(1,128,80,64)) ${VAE:-}"
        STILLS="--config.data.batch=128 ${STILLS:-}"
        BEGIN="--config.data.batch=64 ${BEGIN:-}"
        LONG="--config.data.lengths=((9,128),(33,48)) ${LONG:-}"
        TEACHER="--config.data.batch=64 ${TEACHER:-}"
        CONSISTENCY="--config.data.batch=64 ${CONSISTENCY:-}"
        DMD="--config.data.batch=32 ${DMD:-}"
        JUDGE="--config.data.batch=128 ${JUDGE:-}"
        ;;
    *)
        echo "$0: size is '$SIZE'; expected toy, laptop or gpu" >&2
        exit 2
        ;;
esac

for entry in $BUDGET; do
    if [[ ! "$entry" =~ ^([a-z]+)=[0-9.]+$ || -z "${STEPS[${BASH_REMATCH[1]}]:-}" ]]; then
        echo "$0: BUDGET has '$entry'; expected STAGE=MINUTES, of stages that train: ${!STEPS[*]}" >&2
        exit 2
    fi
done

LABELS="--label labels --label origin"
MIRROR="--config.data.world=mirror --config.data.render_workers=$WORKERS"
LATENT="--config.data.tokenizer=$TOKENIZER --config.weights.vae=$VAE_WEIGHTS"

# The minutes that BUDGET has for a run; nothing if it has none.
budget() {
    local entry
    for entry in $BUDGET; do
        [[ "${entry%%=*}" != "$1" ]] || echo "${entry#*=}"
    done
}

# Whether a run has taken all of its steps, or had its time.
finished() {
    [[ ! -e "$WORK/$1/done" ]] || return 0
    [[ -d "$WORK/$1/export" ]] && "$PYTHON" - "$WORK/$1/metrics.jsonl" "${STEPS[$1]}" <<'PYTHON'
import json, sys
steps = [json.loads(line).get("step", 0) for line in open(sys.argv[1])]
sys.exit(max(steps, default=0) < int(sys.argv[2]))
PYTHON
}

# One piece of a run: its name, its config, further flags.
train() {
    local name=$1 config=$2
    shift 2
    finished "$name" && return
    local minutes steps=${STEPS[$name]} clock=""
    minutes=$(budget "$name")
    if [[ -n "$minutes" ]]; then
        steps=1000000 clock="--config.schedule.name=constant"
        echo "== $name: $minutes minutes"
    else
        minutes=$MINUTES
        echo "== $name: up to $steps steps, at most $minutes minutes now"
    fi
    # shellcheck disable=SC2086
    "$PYTHON" -m launch.train --config "$config" --config.workdir="$WORK/$name" \
        --config.train.steps="$steps" --config.train.max_minutes="$minutes" $COMMON $clock "$@"
    [[ -z "$clock" ]] || touch "$WORK/$name/done"
    finished "$name" || {
        echo "== $name is not finished: call the same command again"
        exit "$AGAIN"
    }
}

# Latents of a split of the mirror world, for the stages behind the VAE: folder, frames, clips.
encode() {
    local out=$1 frames=$2 clips=$3
    # shellcheck disable=SC2086
    "$PYTHON" -m launch.prepare latents --world mirror --weights "$VAE_WEIGHTS" $LABELS \
        --out "$out" --frames "$frames" --clips "$clips" --seed_start "$4" --workers "$WORKERS"
}

# shellcheck disable=SC2086
stage() {
    case "$1" in
        vae)
            [[ "$VAE_WEIGHTS" == "$WORK/vae/export" ]] || return 0
            local from=""
            [[ -n "$START" ]] && from="--config.init_from=$START --config.loss.inflate=false"
            train vae configs/vae.py:runway_tiny_video $MIRROR $from --config.data.clips="$CLIPS" \
                --config.data.labels="('labels',)" --config.loss.garment=3 --config.loss.head=4 ${VAE:-}
            ;;
        latents)
            stage latents_starts
            stage latents_clips
            ;;
        latents_starts)
            encode "$WORK/latents_starts" 9 "$STARTS" 100000
            encode "$WORK/latents_starts" 9 "$HELD" 810000
            ;;
        latents_clips)
            encode "$WORK/latents_clips" 33 "$CLIPS" 0
            encode "$WORK/latents_clips" 33 "$HELD" 800000
            ;;
        stills)
            train stills configs/teacher_forcing.py:runway_tiny_stills $LATENT \
                --config.data.dir="$WORK/latents_starts" ${STILLS:-}
            ;;
        starts)
            train starts configs/teacher_forcing.py:runway_tiny_starts $LATENT \
                --config.data.dir="$WORK/latents_starts" --config.init_from="$WORK/stills/export" ${BEGIN:-}
            ;;
        clips)
            train clips configs/teacher_forcing.py:runway_tiny $LATENT \
                --config.data.dir="$WORK/latents_clips" --config.init_from="$WORK/starts/export" ${LONG:-}
            ;;
        teacher) # the scores of distillation see whole clips at once
            train teacher configs/teacher.py:runway_tiny $LATENT \
                --config.data.dir="$WORK/latents_clips" --config.init_from="$WORK/clips/export" ${TEACHER:-}
            ;;
        consistency)
            train consistency configs/consistency.py:runway_tiny $LATENT \
                --config.data.dir="$WORK/latents_clips" --config.init_from="$WORK/clips/export" \
                --config.weights.text="$WORK/clips/export" ${CONSISTENCY:-}
            ;;
        dmd)
            train dmd configs/dmd.py:runway_tiny $LATENT --config.data.dir="$WORK/latents_clips" \
                --config.init_from="$WORK/consistency/export" --config.weights.text="$WORK/clips/export" \
                --config.weights.score="$WORK/teacher/export" \
                --config.weights.score_text="$WORK/teacher/export" ${DMD:-}
            ;;
        judge)
            local people=$((SCENES / 4))
            train judge configs/judge.py:runway_tiny $MIRROR --config.data.clips="$SCENES" \
                --config.data.people=4 --config.people.count="$people" ${JUDGE:-}
            [[ -f "$WORK/judge/export/judge.json" ]] ||
                "$PYTHON" -m launch.evaluate --bench judge --judge "$WORK/judge/export" --world mirror
            ;;
        bench)
            "$PYTHON" -m launch.evaluate --judge "$WORK/judge/export" --weights "$WORK/dmd/export" \
                --out "$WORK/bench" --scenarios "$SCENARIOS"
            ;;
        *)
            echo "$0: no stage '$1'" >&2
            exit 2
            ;;
    esac
}

for name in $STAGES; do
    stage "$name"
done
echo "== done: $STAGES"
