#!/usr/bin/env bash
# The same as gke.yaml through xpk (pip install xpk), for a cluster that `xpk cluster create` made.
#
#   CLUSTER=my-cluster ZONE=us-west4-a TYPE=v5litepod-256 IMAGE=... BUCKET=my-bucket NAME=llama \
#   CONFIG=llama3_8b_v5e256 bash xpk.sh [--config.train.steps=500 ...]
#
# The bucket is attached to the workload once, with `xpk storage attach`, at /bucket. DRY_RUN=1 prints
# the command in place of running it.
set -euo pipefail

: "${CLUSTER:?}" "${ZONE:?}" "${TYPE:?}" "${IMAGE:?}" "${BUCKET:?}" "${NAME:?}" "${CONFIG:?}"

train=(
  sage-jax train "--config=$CONFIG" "--workdir=/bucket/runs/$NAME"
  "--config.model.path=${MODEL:-/bucket/model}" "--config.data.train=${DATA:-/bucket/pairs.jsonl}"
  "--config.checkpoint.directory=gs://$BUCKET/checkpoints/$NAME"
  --join_timeout=900 "$@" # a pod on a new node pulls its image first
)
command=(
  xpk workload create --cluster="$CLUSTER" --zone="$ZONE" --workload="$NAME" --tpu-type="$TYPE"
  --docker-image="$IMAGE" --max-restarts=100 "--command=$(printf '%q ' "${train[@]}")"
)
if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
