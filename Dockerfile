# This image contains the environment of requirements.lock, the project in /app, and the programs with which nodes
# connect to each other (docker/entrypoint.sh). docker/build.sh sets the build arguments. The torch 2.13.0 package on
# PyPI is built for CUDA 13.0 and includes its libraries. The base image adds nvcc and must provide Python 3.11 or
# newer. debian:bookworm-slim or python:3.12-slim are sufficient for CPU.
# No DeepSpeed operators are built in advance, because a default run uses none. The optimizer is torch's, and the one
# that DeepSpeed would compile on CPU is disabled (pretrain/training/distributed.py); tests/cluster/test_container.py
# checks this. Some options need operators (offloading to NVMe, quantized communication). These are compiled on first
# use for the local processor and GPU (-march=native), and would fail on different ones. The image has nvcc, g++ and libaio-dev
# for this purpose.
ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
# hadolint ignore=DL3006
FROM ${BASE}

# Triton needs g++ and Python.h to compile its launchers at run time. Versions are not pinned, because the mirror of the
# base's distribution removes old versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && if ! command -v python3; then set -- python3-dev python3-venv; fi \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        "$@" ca-certificates g++ libaio-dev make openssh-client openssh-server pdsh procps \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* \
    && useradd --uid 10001 --create-home --shell /bin/bash jepa \
    && install --directory --owner jepa --group jepa /app/runs /cluster

WORKDIR /app
ENV PATH=/app/.venv/bin:$PATH PIP_NO_CACHE_DIR=1
# An index with torch's CPU packages saves 3 GB on machines without a GPU.
ARG PIP_EXTRA_INDEX_URL
COPY Makefile requirements.lock ./
RUN make .venv/.packages
COPY . .
RUN make setup && ln -s /app/docker/ssh_config /etc/ssh/ssh_config.d/jepa.conf

ARG BASE
ARG BASE_DIGEST
ARG REVISION
ENV JEPA_REVISION=$REVISION
LABEL org.opencontainers.image.title=jepa-pretrain \
      org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.revision=$REVISION \
      org.opencontainers.image.base.name=$BASE \
      org.opencontainers.image.base.digest=$BASE_DIGEST

USER 10001:10001
VOLUME /app/runs
HEALTHCHECK --interval=60s --timeout=10s --start-period=60s CMD ["python", "/app/docker/healthcheck.py"]
ENTRYPOINT ["/app/docker/entrypoint.sh"]
CMD ["make", "demo"]
