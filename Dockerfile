# docker build -t unfog .                                       PyTorch as PyPI has it: on x86 with CUDA
# docker build -t unfog --build-arg TORCH_INDEX=URL .           PyTorch from another index, such as the one of its CPU builds
# docker build -t unfog --build-context wheels=FOLDER .         PyTorch from a wheel in a folder

# Empty, or the folder that --build-context names.
FROM scratch AS wheels

FROM python:3.11-slim AS build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src

# The dependencies alone, in a layer that a change of the code leaves standing.
COPY pyproject.toml .
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
      > requirements.txt
ARG TORCH_INDEX=
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=cache,target=/root/.cache/pip \
    torch="$(grep '^torch' requirements.txt)" \
 && if [ -n "$(find /wheels -name 'torch-*.whl')" ]; then \
      pip install --no-index --no-deps --find-links /wheels "$torch"; \
    elif [ -n "$TORCH_INDEX" ]; then \
      pip install --index-url "$TORCH_INDEX" "$torch"; \
    fi \
 && pip install --requirement requirements.txt

COPY LICENSE README.md ./
COPY app app
COPY model model
COPY scripts scripts
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps .

# The step, compiled for the processor that this runs on; on another one the service says that it is not compiled.
FROM build AS compiled
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /
RUN UNFOG_CACHE_DIR=/opt/unfog UNFOG_DEVICE=cpu python -m app --compile

FROM python:3.11-slim
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="unfog" \
      org.opencontainers.image.description="Handwritten digits on request, by diffusion" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
RUN useradd --uid 10001 --user-group --create-home unfog
COPY --from=build /opt/venv /opt/venv
COPY --from=compiled /opt/unfog /opt/unfog
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    UNFOG_CACHE_DIR=/opt/unfog \
    UNFOG_HOST=0.0.0.0 \
    UNFOG_PORT=8000
WORKDIR /home/unfog
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
  CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['UNFOG_PORT']), timeout=4); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "app"]
