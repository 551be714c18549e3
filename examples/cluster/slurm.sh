#!/usr/bin/env bash
# A training on several machines of 8 GPUs, under SLURM. Change the lines marked HERE, then
#
#     sbatch slurm.sh
#
# If it is preempted, or its time ends, it saves a checkpoint, goes back into the queue, and goes on
# from there, with the same bits as if it had not been stopped. Submitted again, it also goes on.

#SBATCH --job-name=spectral-window
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

# HERE: folders that every machine sees. The Python environment is one of them.
source /shared/spectral-window/.venv/bin/activate
TEXT=/shared/text
RUN=/shared/runs/large

# Without numba's cache every machine would compile on its own; kernels of the GPU are Triton's.
export NUMBA_CACHE_DIR=/shared/cache/numba TRITON_CACHE_DIR=/tmp/triton OMP_NUM_THREADS=8

# torchrun starts a process for each GPU, and meets the other machines at the first of them. On
# SIGTERM it waits for its processes, which save: longer than a checkpoint takes to be written.
mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
launch=(
    torchrun
    --nnodes "$SLURM_NNODES" --nproc-per-node 8
    --rdzv-backend c10d --rdzv-endpoint "${machines[0]}:29400" --rdzv-id "$SLURM_JOB_ID"
    --shutdown-timeout 240
)
# HERE: the model, and what each step reads. 64 GPUs, 8 to a row, so 8 rows of 131,072 tokens.
train=(
    -m spectral_window train memory
    hidden_size=2048 num_hidden_layers=24 num_attention_heads=32 memory_heads=16
    initializer_range=0.02 tokenizer=bpe:32000
    sequence_length=131072 batch_size=8 micro_batch_size=1
    shard=full context_parallel=8 gradient_checkpointing=true
    dtype=bfloat16 device=cuda steps=20000 warmup_steps=500 lr=3e-4 save_every=200
    --data "$TEXT" --out "$RUN"
)
if [[ -e $RUN/config.json ]]; then
    train+=(--resume)
fi

# SLURM sends SIGTERM to this shell (B:) before the time ends; before a preemption too, where it is
# set up with PreemptParameters=send_user_signal. The shell hears it only while it waits.
stopped=no
stop() {
    stopped=yes
    scancel --signal=TERM "$SLURM_JOB_ID.0"
}
trap stop TERM
srun "${launch[@]}" "${train[@]}" &
job=$!
code=0
wait "$job" || code=$?
if [[ $stopped == yes ]]; then # that wait ended with the signal; this one ends with the training
    wait "$job" || code=$?
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
