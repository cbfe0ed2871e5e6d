#!/usr/bin/env bash
# A run on a slice of Cloud TPU VMs: waits for the slice in the queue, sets its
# hosts up, trains on all of them, and where it was stopped or the slice was taken
# away does all of it again, until the run is done. The same command continues it.
#
#   bash scripts/launch/tpu_vm.sh --config FILE --config.run_dir=/shared/RUN ...
#   bash scripts/launch/tpu_vm.sh --delete
#
# Once before: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail
cd "$(dirname "$0")/../.."

# --- what to change; each may also be given in the environment
NAME=${NAME:-lorax-train}  # of the slice and of its request
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}  # v2-alpha-tpuv6e for v6e
TIER=${TIER---spot}  # empty for on demand; --reserved
SHARED=${SHARED:-}  # HOST:/PATH, an NFS share such as Filestore's, for /shared
LOG=${LOG:-$NAME.log}
MAX_RESTARTS=${MAX_RESTARTS:-100}
PAUSE=${PAUSE:-60}  # seconds between two looks, or two attempts

request() {
  gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"
}

delete() {
  request delete --force --quiet
}

state() {
  request describe --format='value(state.state)' 2>/dev/null || echo NONE
}

# Returns when there is a slice.
get_slice() {
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    echo "slice $NAME: $now"
    case $now in
      NONE)
        # shellcheck disable=SC2086  # TIER may be empty, or several flags
        request create --node-id="$NAME" --accelerator-type="$TYPE" \
          --runtime-version="$RUNTIME" $TIER
        ;;
      FAILED | SUSPENDED) delete ;;  # a slice taken away does not come back
      *) sleep "$PAUSE" ;;
    esac
  done
}

# A command on all hosts at the same time: they wait for one another. Gives the
# exit code of the first that failed.
on_all() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
    --command="$1"
}

# The code, and what is shared, onto all hosts.
set_up() {
  local command='mkdir -p lorax-train && tar -xzf lorax-train.tgz -C lorax-train'
  if [[ $SHARED ]]; then
    command+=' && sudo apt-get -qq install -y nfs-common && sudo mkdir -p /shared'
    command+=" && (mountpoint -q /shared || sudo mount -t nfs $SHARED /shared)"
  fi
  gcloud compute tpus tpu-vm scp "$code/lorax-train.tgz" "$NAME:" \
    --zone="$ZONE" --worker=all && on_all "$command"
}

train() {
  on_all "bash lorax-train/scripts/launch/on_host.sh tpu$(printf ' %q' "$@")"
}

if [[ ${1:-} == --delete ]]; then
  delete
  exit
fi
exec > >(tee -a "$LOG") 2>&1

code=$(mktemp -d)
trap 'rm -r "$code"' EXIT
git ls-files -z --cached --others --exclude-standard |
  tar --create --gzip --null --files-from=- --file="$code/lorax-train.tgz"

for ((attempt = 0; attempt <= MAX_RESTARTS; attempt++)); do
  get_slice
  status=255
  if set_up; then
    status=0
    train "$@" || status=$?
  fi
  case $status in
    0) exit 0 ;;
    # What no second attempt mends; the trainer has said what it is.
    2 | 3 | 4 | 5 | 6) exit "$status" ;;
    1) [[ $(state) != ACTIVE ]] || exit 1 ;;  # its own, and not gcloud's
  esac
  # Stopped with a checkpoint (75), a host lost (134, 137), the connection (255).
  echo "attempt $attempt ended with exit code $status"
  sleep "$PAUSE"
done
exit "$status"
