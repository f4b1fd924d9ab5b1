#!/usr/bin/env bash
# Build the image jepa-pretrain, with labels that name its base image and its commit, and print its id.
# BASE in the environment selects a different base image. All arguments are passed to docker build.
set -euo pipefail
cd "$(dirname "$0")/.."

base=${BASE:-$(sed -n 's/^ARG BASE=//p' Dockerfile)}
docker image inspect "$base" > /dev/null 2>&1 || docker pull --quiet "$base"
# A base image that was never in a registry has no digest; its id is used instead.
digest=$(docker image inspect --format '{{if .RepoDigests}}{{index .RepoDigests 0}}{{else}}{{.Id}}{{end}}' "$base")
docker build --build-arg BASE="$base" --build-arg BASE_DIGEST="${digest##*@}" \
    --build-arg REVISION="$(git describe --always --dirty --abbrev=40)" \
    --build-arg PIP_EXTRA_INDEX_URL --tag jepa-pretrain "$@" .
docker image inspect --format '{{.Id}}' jepa-pretrain
