# Bloomery with every version from constraints.txt.
#   docker build -t bloomery .                                    processors
#   docker build -t bloomery:cuda --build-arg ACCELERATOR=cuda .  NVIDIA GPUs (the driver is the host's)
FROM python:3.11-slim-bookworm
ARG ACCELERATOR=cpu
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 GOMP_SPINCOUNT=10000
# The compiler is for torch.compile, the libraries for NCCL over InfiniBand and RoCE.
RUN apt-get update && apt-get install -y --no-install-recommends g++ \
      $([ "$ACCELERATOR" = cuda ] && echo libibverbs1 ibverbs-providers librdmacm1) && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/bloomery
COPY constraints.txt pyproject.toml README.md LICENSE ./
# PyTorch alone first: its layer stays when our source changes.
RUN case "$ACCELERATOR" in \
      cpu) pip install -c constraints.txt torch --index-url https://download.pytorch.org/whl/cpu \
             --extra-index-url https://pypi.org/simple ;; \
      cuda) pip install -c constraints.txt torch ;; \
      *) echo "ACCELERATOR is cpu or cuda, not $ACCELERATOR" >&2; exit 2 ;; \
    esac
COPY src src
RUN pip install -c constraints.txt .
WORKDIR /work
ENTRYPOINT ["bloomery"]
CMD ["--help"]
