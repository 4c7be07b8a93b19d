# `ship-ds serve` over a run, on the CPU (docs/serving.md).
#
#     docker build -f docker/serve.Dockerfile -t ship-ds-serve .
#     docker run --rm -p 127.0.0.1:8000:8000 -e SHIP_DS_API_KEY=KEY -v "$PWD/runs/quickstart:/srv/run:ro" ship-ds-serve
#
# Nobody has built it yet: tests/test_containers.py reads it, and hadolint does.
FROM python:3.11-slim-bookworm

# PyPI's torch for Linux brings CUDA along, which the CPU has no use for. With a GPU: --build-arg PIP_FLAGS="".
ARG PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
ENV HF_HUB_OFFLINE=1 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

WORKDIR /opt/ship_ds
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY ds_configs ds_configs
COPY ship_ds ship_ds
# torch first: DeepSpeed's build asks for it. PIP_FLAGS is several words.
# hadolint ignore=DL3013,DL3042,SC2086
RUN pip install $PIP_FLAGS -c constraints.txt torch numpy setuptools \
    && pip install $PIP_FLAGS -c constraints.txt '.[serve]' \
    && useradd --create-home --uid 1000 ship

USER 1000
WORKDIR /home/ship
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=180s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Another host than this machine's needs SHIP_DS_API_KEY; without it the container ends with a line that says so.
ENTRYPOINT ["ship-ds", "serve"]
CMD ["--run", "/srv/run", "--host", "0.0.0.0", "--port", "8000"]
