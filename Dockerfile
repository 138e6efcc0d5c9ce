# ddpm with CUDA: docker build -t ddpm .            how to run it: docs/cluster.md
# CUDA 13.0 is what torch's own wheels are built for. They bring its libraries: `runtime` in place of `base` would hold
# them twice, 2 GB more. The driver is the host's.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# The compiler and Python's headers are for torch.compile. No versions: the base image's tag names the distribution.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# Everything but our own code, which changes oftener: `pip install` of a project that has no packages yet.
WORKDIR /opt/ddpm
COPY pyproject.toml constraints.txt ./
ARG EXTRAS=s3,video
RUN touch README.md LICENSE && pip install -c constraints.txt ".[$EXTRAS]"

COPY . .
RUN pip install --no-deps . && rm -rf build

# Any user id may run it (docker run --user): nothing in the image needs to be written to, and caches have a place.
ENV HOME=/tmp USER=ddpm
USER 10001
WORKDIR /work
ENTRYPOINT ["ddpm"]
