# docker build -t infir2 . && docker run --rm -it -v "$PWD/runs:/app/runs" infir2 demo
# To pin the base: --build-arg BASE=python:3.12-slim@sha256:...
ARG BASE=python:3.12-slim
FROM $BASE

# Options of pip for installing torch, to choose another build of it (the README says when).
ARG PIP_OPTIONS=""

RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 infir2 \
    && install --directory --owner=infir2 --group=infir2 /app /app/runs

WORKDIR /app
USER infir2
COPY --chown=infir2:infir2 . .
RUN PIP_NO_CACHE_DIR=1 make venv PIP_OPTIONS="$PIP_OPTIONS"
ENV PATH="/app/.venv/bin:$PATH" OMP_WAIT_POLICY=PASSIVE
ENTRYPOINT ["infir2"]
CMD ["--help"]
