#!/bin/bash
#SBATCH --job-name={{ name }}
#SBATCH --nodes={{ job.shape.nodes | replace(":", "-") }}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={{ job.cpu }}
#SBATCH --mem={{ job.memory_mb }}M
{% if job.gpu %}
#SBATCH --gpus-per-node={{ job.gpu }}
{% endif %}
#SBATCH --signal=TERM@{{ GRACE_SECONDS }}
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --requeue
# Add what your cluster wants: --partition, --account, --time (well above the {{ GRACE_SECONDS }} s of --signal)
set -u
export PATH={{ PROGRAMS | quoted }}:$PATH
export HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
{% for name, value in environment(job).items() %}
export {{ name }}={{ value | quoted }}
{% endfor %}
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 --wait=60 \
  python -m {{ AGENT }} {{ words }}
code=$?
# {{ PREEMPTED }}: stopped with a checkpoint; a second start continues from it. scancel ends the job for good.
if [ $code -eq {{ PREEMPTED }} ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
