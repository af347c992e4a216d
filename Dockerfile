# docker build -t weft .          docker run --rm --gpus all --shm-size 8g weft weft --help
# devel, because Triton and DeepSpeed compile on the machine that runs them. BASE must bring torch 2.11 or newer.
ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel
FROM ${BASE}

# Newer base images mark their Python as managed by the system; in an image of one purpose it is ours to change.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

WORKDIR /opt/weft
COPY . .

# The base's own torch, with its CUDA part (2.13.0+cu130), takes the place of the pin: pip then has nothing to replace.
RUN python -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > /tmp/constraints.txt \
    && grep -v '^torch==' constraints.txt >> /tmp/constraints.txt \
    && python -m pip install --editable . --constraint /tmp/constraints.txt \
    && rm /tmp/constraints.txt

# A run started in a folder that has its own models/ must still take ours.
ENV PYTHONPATH=/opt/weft \
    PYTHONSAFEPATH=1

# Any user id may work here: caches go to HOME, which such a user would otherwise lack.
RUN mkdir -p /workspace && chmod 1777 /workspace
ENV HOME=/workspace
WORKDIR /workspace
