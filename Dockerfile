# docker build -t weft .
# docker run --rm --gpus all --shm-size 8g --user $(id -u) -v $PWD:/workspace weft weft --help
# devel, because Triton compiles on the machine that runs it. BASE must bring Python 3.11 and torch 2.11 or newer.
ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel
FROM ${BASE}

ENV PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# Extras of pyproject.toml to install too: --build-arg EXTRAS=engines
ARG EXTRAS=

WORKDIR /opt/weft
COPY . .

# An environment on top of the base's packages: what apt or conda installed cannot be uninstalled by pip, only be stood
# in front of. Without a pip of its own, because Debian's Python lacks ensurepip; the base's is in sight.
# The base's own torch, with its CUDA part (2.13.0+cu130), takes the place of the pin: pip then has nothing to replace.
RUN python3 -m venv --without-pip --system-site-packages /opt/venv \
    && /opt/venv/bin/python -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > /tmp/pins \
    && grep -v '^torch==' constraints.txt >> /tmp/pins \
    && /opt/venv/bin/python -m pip install --editable ".${EXTRAS:+[$EXTRAS]}" --constraint /tmp/pins \
    && rm /tmp/pins

# The base's torchrun would start the base's Python, which does not see the environment.
RUN printf '#!/bin/sh\nexec /opt/venv/bin/python -m torch.distributed.run "$@"\n' > /opt/venv/bin/torchrun \
    && chmod 755 /opt/venv/bin/torchrun \
    && chmod -R a+rX /opt/weft

# A run started in a folder that has its own models/ must still take ours.
ENV PATH=/opt/venv/bin:${PATH} \
    PYTHONPATH=/opt/weft \
    PYTHONSAFEPATH=1

# Any user id may work here, with --user. Such a user has no account, from which caches would take HOME and a name.
RUN mkdir -p /workspace && chmod 1777 /workspace
ENV HOME=/workspace \
    USER=weft
WORKDIR /workspace
USER 1000
