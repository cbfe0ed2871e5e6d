#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster, as a JobSet: started again as a whole where
# a host is lost or stops with a checkpoint, and continued by the same command.
#
#   bash scripts/launch/gke_jobset.sh --config FILE --config.run_dir=/shared/RUN ...
#   bash scripts/launch/gke_jobset.sh --print --config FILE ...
#
# The cluster has the JobSet controller, and a node pool of that type and topology.
# The image is made of scripts/launch/Dockerfile.
set -euo pipefail

# --- what to change; each may also be given in the environment
NAME=${NAME:-lorax-train}
IMAGE=${IMAGE:-lorax-train:latest}
ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice}
TOPOLOGY=${TOPOLOGY:-4x4}
HOSTS=${HOSTS:-4}  # machines of a slice: all its chips over those of one
CHIPS=${CHIPS:-4}  # of a machine
SLICES=${SLICES:-1}
CLAIM=${CLAIM:-lorax-runs}  # a ReadWriteMany volume claim, such as Filestore's
MAX_RESTARTS=${MAX_RESTARTS:-100}

jobset() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $MAX_RESTARTS
    rules:
      - name: nothing-to-retry
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $SLICES
      template:
        spec:
          parallelism: $HOSTS
          completions: $HOSTS
          backoffLimit: 0
          # What no restart mends. All else, 75 (stopped with a checkpoint) among
          # it, restarts the whole set.
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: trainer
                  operator: In
                  values: [1, 2, 3, 4, 5, 6]
          template:
            spec:
              restartPolicy: Never
              # Of these a spot machine leaves what it has left.
              terminationGracePeriodSeconds: 300
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
              containers:
                - name: trainer
                  image: $IMAGE
                  resources:
                    limits:
                      google.com/tpu: $CHIPS
                  volumeMounts:
                    - name: shared
                      mountPath: /shared
                  # The first process of its container: signals reach it.
                  command:
                    - python
                    - -m
                    - lorax_train.main
$(printf "                    - '%s'\n" "${@//\'/\'\'}")
              volumes:
                - name: shared
                  persistentVolumeClaim:
                    claimName: $CLAIM
YAML
}

if [[ ${1:-} == --print ]]; then
  jobset "${@:2}"
  exit
fi
kubectl delete jobset "$NAME" --ignore-not-found
jobset "$@" | kubectl apply -f -
echo "logs: kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=$NAME,\
batch.kubernetes.io/job-completion-index=0"
