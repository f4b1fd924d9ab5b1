#!/usr/bin/env bash
# Build the image jepa-pretrain with the names of what it is made from; prints its id. BASE in the environment names another base; arguments go to docker build.
set -euo pipefail
cd "$(dirname "$0")/.."

base=${BASE:-$(sed -n 's/^ARG BASE=//p' Dockerfile)}
docker image inspect "$base" > /dev/null 2>&1 || docker pull --quiet "$base"
# A base that was never in a registry has no digest but its id.
digest=$(docker image inspect --format '{{if .RepoDigests}}{{index .RepoDigests 0}}{{else}}{{.Id}}{{end}}' "$base")
docker build --build-arg BASE="$base" --build-arg BASE_DIGEST="${digest##*@}" --build-arg REVISION="$(git describe --always --dirty --abbrev=40)" \
    --build-arg PIP_EXTRA_INDEX_URL --tag jepa-pretrain "$@" .
docker image inspect --format '{{.Id}}' jepa-pretrain
