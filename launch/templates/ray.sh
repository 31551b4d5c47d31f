#!/bin/bash
#SBATCH --job-name={{ name }}
#SBATCH --nodes={{ job.shape.hosts }}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={{ job.cpu }}
#SBATCH --mem={{ job.memory_mb }}M
{% if job.gpu %}
#SBATCH --gpus-per-node={{ job.gpu }}
{% endif %}
#SBATCH --output=%x-%j.out
# Add what your cluster wants: --partition, --account, --time. A job that was cut off goes on where it was when it is submitted again.
set -u
export PATH={{ PROGRAMS | quoted }}:$PATH
{% for key, value in environment(job).items() %}
export {{ key }}={{ value | quoted }}
{% endfor %}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RAY_ADDRESS="$(getent ahostsv4 "$HEAD" | awk '{ print $1; exit }'):$((20000 + SLURM_JOB_ID % 10000))"
# Nobody but this job may use its Ray
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
# One Ray process a host; the others join when the first one's answers. They end with this script.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
  share="--num-cpus={{ job.cpu }} --num-gpus={{ job.gpu }} --disable-usage-stats --block"
  if [ "$SLURM_NODEID" -eq 0 ]; then
    exec ray start --head --include-dashboard=false --node-ip-address="${RAY_ADDRESS%:*}" --port="${RAY_ADDRESS##*:}" $share
  fi
  until ray health-check --address "$RAY_ADDRESS" 2> /dev/null; do sleep 1; done
  exec ray start --address="$RAY_ADDRESS" $share' &
trap "kill $!; wait" EXIT
until ray health-check --address "$RAY_ADDRESS" 2> /dev/null; do sleep 1; done
python -c '
import ray, time
ray.init(log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < {{ job.shape.hosts }}:
    time.sleep(1)'
{{ words }}
