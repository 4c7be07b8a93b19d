# Training on NVIDIA GPUs (docs/cluster.md). With the compiler: DeepSpeed makes its optimisers at the first start.
#
#     docker build -f docker/train.Dockerfile -t ship-ds-train .
#     docker run --rm --gpus all --ipc host -v "$PWD/runs:/srv/runs" -v "$PWD/data:/srv/data:ro" -v "$PWD/bases:/srv/bases:ro" \
#         ship-ds-train deepspeed --num_gpus 8 ship_ds/train.py --config lora-8b model.task_llm.base=/srv/bases/MODEL \
#         data.path=/srv/data run.folder=/srv/runs/lora-8b
#
# The folder that runs go to has to be writable for the user with id 1001. Nobody has built it yet: tests/test_containers.py
# reads it, and hadolint does. The CUDA of the image is that of torch's wheels; it has to be one that torch knows.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

ARG PIP_FLAGS=""
ENV DEBIAN_FRONTEND=noninteractive HF_HUB_OFFLINE=1 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# libaio is what DeepSpeed writes to NVMe with.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ libaio-dev libjemalloc2 python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/ship_ds
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY ds_configs ds_configs
COPY slurm slurm
COPY ship_ds ship_ds
# torch first: DeepSpeed's build asks for it. Editable, since launchers are given ship_ds/train.py. PIP_FLAGS is several words.
# hadolint ignore=DL3013,DL3042,SC2086
RUN python3.12 -m venv /opt/venv \
    && pip install $PIP_FLAGS -c constraints.txt torch numpy setuptools \
    && pip install $PIP_FLAGS -c constraints.txt -e . \
    && useradd --create-home --uid 1001 ship

USER 1001
# DeepSpeed's compiled ops; a volume here spares the next container the minutes that they take.
ENV TORCH_EXTENSIONS_DIR=/home/ship/torch_extensions
# A training has no port that could be asked; `RUN/ranks/` shows where each rank is.
HEALTHCHECK NONE
CMD ["ship-ds", "doctor"]
