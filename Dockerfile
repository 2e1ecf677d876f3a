# docker build -t infir2 . && docker run --rm -it -v "$PWD/runs:/app/runs" infir2 demo
# docker build -t infir2-gpu --target gpu . && docker run --rm --gpus all infir2-gpu doctor
# The base is Python 3.12.15 of October 2026, for every platform. To renew it, take the digest that
# `docker buildx imagetools inspect python:3.12-slim` prints first; --build-arg BASE=... takes another.
ARG BASE=python:3.12-slim@sha256:dddfd7e07f9d15aeeca61529320492139d21cac7f0070c00609243e51e4e0016

FROM $BASE AS base
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 infir2 \
    && install --directory --owner=infir2 --group=infir2 /app /app/runs
WORKDIR /app
USER infir2
COPY --chown=infir2:infir2 . .
ENV PATH="/app/.venv/bin:$PATH" OMP_WAIT_POLICY=PASSIVE
ENTRYPOINT ["infir2"]
CMD ["--help"]

# For Linux on x86_64. CUDA's libraries come with torch's wheels, so the host needs NVIDIA's driver and
# container toolkit only. Triton compiles its launchers with gcc, DeepGEMM its kernels with nvcc and g++.
FROM base AS gpu
USER root
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER infir2
RUN python -m venv .venv \
    && .venv/bin/python -m pip install --no-cache-dir -c constraints.txt -e '.[gpu]'
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# The last stage is what is built without --target.
FROM base AS cpu
# Options of pip for installing torch, to choose another build of it (the README says when).
ARG PIP_OPTIONS=""
# hashes.txt: install files with these sums only (see the Makefile).
ARG HASHES=""
RUN PIP_NO_CACHE_DIR=1 make venv PIP_OPTIONS="$PIP_OPTIONS" HASHES="$HASHES"
