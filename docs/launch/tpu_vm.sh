#!/usr/bin/env bash
# Trains on a TPU VM slice, one host or many: makes it if it is not there, starts the same command on
# every host, and goes on from the last checkpoint when the slice was preempted.
#
#   NAME=llama ZONE=us-west4-a TYPE=v5litepod-256 BUCKET=gs://my-bucket \
#   MODEL=gs://my-bucket/Meta-Llama-3-8B-Instruct DATA=gs://my-bucket/pairs.jsonl \
#   CONFIG=llama3_8b_v5e256 bash tpu_vm.sh [--config.train.steps=500 ...]
#
# Set SPOT=1 for preemptible capacity. DRY_RUN=1 prints the commands in place of running them.
set -euo pipefail

: "${NAME:?name of the slice}" "${ZONE:?}" "${TYPE:?accelerator type, e.g. v5litepod-256}"
: "${BUCKET:?gs://...}" "${MODEL:?gs://... or a path on the hosts}" "${DATA:?gs://...}" "${CONFIG:?}"
VERSION=${VERSION:-v2-alpha-tpuv5-lite} # of the TPU VM image; v2-alpha-tpuv5 on v5p
PACKAGE=${PACKAGE:-sage_jax[tpu,gcs]}   # or a wheel in the bucket: gs://.../sage_jax-....whl
ATTEMPTS=${ATTEMPTS:-100}

gcloud() {
  if [[ -n ${DRY_RUN:-} ]]; then
    printf 'gcloud'
    printf ' %q' "$@"
    printf '\n'
  else
    command gcloud "$@"
  fi
}

on_all_hosts() { # the first process speaks for all
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

is_ready() {
  [[ -z ${DRY_RUN:-} ]] || return 1
  [[ $(command gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" \
    --format='value(state)' 2>/dev/null) == READY ]]
}

make_slice() {
  gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet || true # what a preemption left
  gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
    --version="$VERSION" ${SPOT:+--spot}
}

# Weights and pairs are copied to each host once; each reads the parts that its chips hold.
# A process that fails ends those of all hosts, so that ssh returns.
setup="set -e; python3 -m venv ~/venv; package=$(printf '%q' "$PACKAGE")
case \$package in gs://*) gcloud storage cp \"\$package\" ~/; package=~/\$(basename \"\$package\")[tpu,gcs];; esac
~/venv/bin/pip install -q \"\$package\"
mkdir -p ~/model
gcloud storage rsync -r $(printf '%q' "$MODEL") ~/model
gcloud storage cp $(printf '%q' "$DATA") ~/pairs.jsonl"

# metrics.jsonl and the rest of the workdir are on the first host; they leave it when a run ends.
train="\$HOME/venv/bin/sage-jax train --config=$CONFIG --workdir=runs/$NAME \
--config.model.path=\$HOME/model --config.data.train=\$HOME/pairs.jsonl \
--config.checkpoint.directory=$BUCKET/$NAME/checkpoints$(printf ' %q' "$@"); code=\$?; \
gcloud storage rsync -r runs/$NAME $BUCKET/$NAME/workdir >/dev/null 2>&1 || true; exit \$code"
restore="mkdir -p runs/$NAME; gcloud storage rsync -r $BUCKET/$NAME/workdir runs/$NAME >/dev/null 2>&1 || true"

quick=0
for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
  if ! is_ready; then
    make_slice || {
      echo "attempt $attempt: no capacity; again in a minute" >&2
      [[ -n ${DRY_RUN:-} ]] || sleep 60
      continue
    }
    on_all_hosts "$setup"
    on_all_hosts "$restore"
  fi
  began=$SECONDS
  if on_all_hosts "$train"; then
    echo "finished; checkpoints and workdir: $BUCKET/$NAME"
    exit 0
  fi
  # What fails at once on a slice that is still there is a mistake, which trying again repeats.
  if is_ready && ((SECONDS - began < 120)); then
    quick=$((quick + 1))
  else
    quick=0
  fi
  if ((quick == 3)); then
    echo "it failed three times within two minutes; see above" >&2
    exit 1
  fi
  echo "attempt $attempt ended; going on from the last checkpoint" >&2
done
exit 1
