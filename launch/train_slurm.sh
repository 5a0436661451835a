#!/usr/bin/env bash
# Train on a Slurm cluster, one process a GPU:
#
#     sbatch launch/train_slurm.sh --config configs/teacher_forcing.py:paper \
#         --config.data.dir=/shared/latents --config.data.tokenizer=/shared/tokenizer.json \
#         --config.weights.vae=/shared/vae --config.workdir=/shared/runs/student
#
# Start it in the folder of the project. The workdir must be on a disk that all nodes share. The
# environment is $VENV (default .venv).
#
# Five minutes before its time is over the job is told to end: it saves, and waits in the queue
# again. So it does when a node fails. An error that is not the machine's (exit code 1 or 2) ends it.
#SBATCH --job-name=chameleon
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -uo pipefail

MOST_RESTARTS=20

code=0
srun --label "${VENV:-.venv}/bin/python" -m launch.train --distributed "$@" || code=$?

case "$code" in
    75 | 137 | 143) # another process lost, killed, told to end
        if ((${SLURM_RESTART_COUNT:-0} < MOST_RESTARTS)); then
            echo "exit code $code: the job waits in the queue again"
            scontrol requeue "$SLURM_JOB_ID"
        fi
        ;;
esac
exit "$code"
