# docker build -t unfog .                                       PyTorch from PyPI: on x86, the CUDA build
# docker build -t unfog --build-arg TORCH_INDEX=URL .           PyTorch from another index, for example its CPU index
# docker build -t unfog --build-context wheels=FOLDER .         PyTorch from a wheel in a folder
# docker build -t unfog --build-arg COMPILER=gcc .              with a C compiler, for UNFOG_COMPILE=on on a GPU
# docker build -t unfog --build-arg EXTRAS=clip .               with CLIP (docs/configuration.md)
# docker build -t unfog-train --target train .                  the training image (docs/deployment.md)
ARG PYTHON=python:3.11-slim

# Empty, or the folder of --build-context wheels=FOLDER.
FROM scratch AS wheels

# This layer has only dependencies, so that a change of the code does not invalidate it. The venv has no pip, because
# nothing is installed into a finished image.
FROM $PYTHON AS dependencies
RUN python -m venv --without-pip /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PIP_PYTHON=/opt/venv/bin/python
WORKDIR /src
COPY pyproject.toml constraints.txt ./
# Includes the extras `traces`, `postgres` and `redis`, because compose passes UNFOG_TRACES, UNFOG_DATABASE_URL and
# UNFOG_RATE_LIMIT_URL to the service.
# EXTRAS names further extras of pyproject.toml, separated by spaces. The extra `clip` needs torchvision. Its build must
# match the build of PyTorch, so both come from the same source.
ARG EXTRAS=
RUN python -c 'import sys, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; extras = project["optional-dependencies"]; found = [each for name in sys.argv[1:] for each in extras[name]]; own = [each for each in found if each.startswith(project["name"] + "[")]; own and sys.exit(f"EXTRAS needs {own[0]}, which is not on a package index. Name only extras of the service: clip, parquet"); print(*project["dependencies"], *found, sep="\n")' \
      traces postgres redis $EXTRAS > requirements.txt
ARG TORCH_INDEX=
# The tested minor version. PyPI's build needs an NVIDIA driver that supports its CUDA version.
ARG TORCH_VERSION=2.13
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=cache,target=/root/.cache/pip \
    torch="torch==$TORCH_VERSION.*" \
 && torchvision= \
 && if grep -q '^open_clip_torch' requirements.txt; then torchvision=torchvision; fi \
 && if [ -n "$(find /wheels -name 'torch-*.whl')" ]; then \
      pip install --no-index --no-deps --no-compile --find-links /wheels "$torch" $torchvision; \
    elif [ -n "$TORCH_INDEX" ]; then \
      pip install --no-compile --index-url "$TORCH_INDEX" "$torch" $torchvision; \
    fi \
 && pip install --no-compile --constraint constraints.txt --requirement requirements.txt "$torch"

FROM dependencies AS code
COPY LICENSE .
COPY app app
COPY model model
COPY scripts scripts
# An empty README.md, because a change of its text would otherwise cause a new compilation of the step.
RUN --mount=type=cache,target=/root/.cache/pip touch README.md && pip install --no-deps --no-compile --target /opt/code .

# Compiles the denoising step for the CPU of this build machine. On another CPU, the service runs it uncompiled.
FROM dependencies AS compiled
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
ENV PYTHONPATH=/opt/code \
    UNFOG_CACHE_DIR=/opt/unfog \
    UNFOG_DEVICE=cpu
WORKDIR /
COPY --from=code /opt/code /opt/code
RUN PYTHONDONTWRITEBYTECODE=1 python -m app --compile

# Removes files that only compilers and tests need. Then starts the service once without a compiler, which checks that
# the remaining files are sufficient, and writes the byte code of the imported modules only. The byte code of all modules
# would be 10 % of the image.
FROM compiled AS trimmed
RUN site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
 && rm -rf "$site"/torch/include "$site"/torch/bin/protoc* \
 && find "$site" -type d -name tests -prune -exec rm -rf {} + \
 && CXX=none python -m app --compile

FROM $PYTHON AS runtime
RUN useradd --uid 10001 --user-group --create-home --shell /usr/sbin/nologin unfog \
 && install --directory --owner unfog --group unfog /runs \
 && install --directory --owner unfog --group unfog --mode 700 /var/lib/unfog
COPY --from=trimmed /opt/venv /opt/venv
COPY --from=trimmed /opt/unfog /opt/unfog
COPY --from=trimmed /opt/code /opt/code
# UNFOG_COMPILE=on stores GPU kernels here. With a read-only root file system, mount it with permission to execute.
RUN install --directory --owner unfog --group unfog --mode 700 /opt/unfog/gpu
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/code \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    UNFOG_CACHE_DIR=/opt/unfog \
    UNFOG_DATA_DIR=/var/lib/unfog \
    UNFOG_HOST=0.0.0.0 \
    UNFOG_PORT=8000
WORKDIR /home/unfog
USER 10001:10001

# Trains and writes runs to /runs. It compiles at run time, also on a GPU, so it needs the compiler and the headers that
# the stage `trimmed` removed.
FROM runtime AS train
USER root
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/* \
 && install --directory --owner unfog --group unfog /data
ARG TORCH_INDEX=
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=bind,source=pyproject.toml,target=/src/pyproject.toml \
    --mount=type=bind,source=constraints.txt,target=/src/constraints.txt \
    --mount=type=cache,target=/root/.cache/pip \
    export PIP_PYTHON=/opt/venv/bin/python PIP_CONSTRAINT='/tmp/installed.txt /src/constraints.txt' \
 && python -c 'import torch; print(f"torch=={torch.__version__}")' > /tmp/installed.txt \
 && python -c 'import tomllib; print(*tomllib.load(open("/src/pyproject.toml", "rb"))["project"]["optional-dependencies"]["train"], sep="\n")' \
      > /tmp/requirements.txt \
 && torchvision="$(grep '^torchvision' /tmp/requirements.txt)" \
 && if [ -n "$(find /wheels -name 'torchvision-*.whl')" ]; then \
      pip install --no-index --no-deps --no-compile --find-links /wheels "$torchvision"; \
    elif [ -n "$TORCH_INDEX" ]; then \
      pip install --no-compile --index-url "$TORCH_INDEX" "$torchvision"; \
    fi \
 && pip install --no-compile --requirement /tmp/requirements.txt \
 && rm /tmp/installed.txt /tmp/requirements.txt
RUN --mount=type=bind,from=dependencies,source=/opt/venv,target=/dependencies \
    cp --recursive /dependencies/lib/python*/site-packages/torch/include /opt/venv/lib/python*/site-packages/torch/
ENV MPLCONFIGDIR=/tmp/matplotlib
USER 10001:10001
ENTRYPOINT ["python", "-m", "scripts.train", "--data-dir", "/data"]
CMD ["--preset", "default", "--out", "/runs/default"]

FROM runtime AS service
ARG COMPILER=
USER root
RUN --mount=type=tmpfs,target=/var/lib/apt/lists \
    if [ -n "$COMPILER" ]; then \
      apt-get update && apt-get install --yes --no-install-recommends "$COMPILER" libc6-dev; \
    fi
USER 10001:10001
EXPOSE 8000
# Uses /readyz, because dependent containers and `up --wait` wait for a service that can generate images. The start period
# is 5 minutes, because UNFOG_COMPILE=on compiles for up to 4 minutes on a GPU. A container becomes healthy at its first
# successful check, also during the start period.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
  CMD ["python", "-ISc", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['UNFOG_PORT']), timeout=4); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "app"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="unfog" \
      org.opencontainers.image.description="Diffusion service that generates handwritten digits" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
