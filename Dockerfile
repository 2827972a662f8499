# One image for the worker, the HTTP API and every command.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# An index with the build of torch that you want; empty takes the default one (on Linux: CUDA).
ARG TORCH_INDEX=""

# The operators for a CPU are compiled where they run; Triton compiles a launcher where there is a GPU.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/loramill
COPY constraints.txt ./
RUN version="$(sed -n 's/^torch==//p' constraints.txt)" \
    && pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==$version"
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt .

# Nothing that it runs needs root; what it caches goes to the user's home.
RUN useradd --create-home loramill && install -d -o loramill /jobs && install -d -o loramill -m 700 /keys
USER loramill
WORKDIR /jobs
ENTRYPOINT ["loramill"]
CMD ["--help"]
