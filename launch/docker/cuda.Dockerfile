# The live page on an NVIDIA GPU:
#
#     docker build -f launch/docker/cuda.Dockerfile -t chameleon-cuda .
#     docker run --rm --gpus all -p 127.0.0.1:8000:8000 -v chameleon:/cache \
#         -v $PWD/weights:/weights:ro chameleon-cuda \
#         --config configs/wan22_5b.py --weights /weights
#
# The host needs a driver for CUDA 13 and the NVIDIA Container Toolkit; CUDA itself comes with JAX.
FROM python:3.12-slim

RUN useradd --create-home --uid 1000 chameleon && mkdir /cache && chown chameleon /cache
WORKDIR /src
COPY setup.py README.md ./
COPY chameleon_jax chameleon_jax
COPY configs configs
COPY converters converters
COPY launch launch
RUN pip install --no-cache-dir ".[serve,cuda13]" && rm -rf /src/*

USER chameleon
WORKDIR /home/chameleon
ENV JAX_PLATFORMS=cuda CHAMELEON_CACHE=/cache PYTHONUNBUFFERED=1
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=10m --interval=30s --timeout=5s CMD ["python", "-c", \
    "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["chameleon", "serve", "--host", "0.0.0.0", "--port", "8000"]
