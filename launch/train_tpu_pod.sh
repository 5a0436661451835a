#!/usr/bin/env bash
# Train on all hosts of a Cloud TPU slice:
#
#     TPU=my-v6e-32 ZONE=us-east5-a launch/train_tpu_pod.sh \
#         --config configs/teacher_forcing.py:paper --config.data.dir=/shared/latents \
#         --config.data.tokenizer=/shared/tokenizer.json --config.weights.vae=/shared/vae \
#         --config.workdir=/shared/runs/student
#
# On every host: the project in $FOLDER (default ~/chameleon_jax) with its environment in .venv, and
# one disk that all share, for the workdir. JAX finds the other hosts in the metadata of the slice.
#
# When a process dies, all end with exit code 75 within a minute, and every host starts the same
# command again; the run resumes from its newest checkpoint.
set -euo pipefail

: "${TPU:?name of the TPU slice}" "${ZONE:?zone of the TPU slice}"
FOLDER="${FOLDER:-chameleon_jax}"
MOST_RESTARTS=20

command="$(printf '%q ' .venv/bin/python -m launch.train --distributed "$@")"

gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "
cd $(printf '%q' "$FOLDER") || exit 1
for restart in \$(seq 0 $MOST_RESTARTS); do
    code=0
    $command || code=\$?
    case \$code in
        75 | 137) echo \"exit code \$code: starting again\"; sleep 10 ;;
        *) exit \$code ;;
    esac
done
exit \$code
"
