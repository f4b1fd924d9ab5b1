# The environment of requirements.lock, the project in /app, and what nodes need to find each other (docker/entrypoint.sh).
# docker/build.sh fills in the arguments. torch 2.13.0 as pip finds it is built for CUDA 13.0 and brings its libraries; the base adds nvcc, and
# must offer Python 3.11 or newer. debian:bookworm-slim or python:3.12-slim do for CPU.
# No operator of DeepSpeed is built in advance, for a start uses none: the optimizer is torch's, and the one that DeepSpeed itself would compile
# on CPU is left out (pretrain/training/distributed.py). tests/cluster/test_container.py sees to it. What options ask for (offloading to NVMe, quantized
# communication) is compiled for the very processor and GPU that it meets, -march=native, and would fail on others: nvcc, g++ and libaio-dev are there.
ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
# hadolint ignore=DL3006
FROM ${BASE}

# g++ and Python.h: Triton compiles its launchers with them at run time. The versions are those of the base's distribution, whose mirror drops
# old ones, so that pinned ones could not be installed for long.
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
# An index with torch's CPU packages saves 3 GB where there is no GPU.
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
