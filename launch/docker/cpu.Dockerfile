# The live page on a CPU, with the embedded model:
#
#     docker build -f launch/docker/cpu.Dockerfile -t chameleon .
#     docker run --rm -p 127.0.0.1:8000:8000 chameleon
#
# It prints the address of the page. Programs are compiled at the first start and kept in the volume
# /cache. With weights and pictures of your own:
#
#     docker run --rm -p 127.0.0.1:8000:8000 -v chameleon:/cache -v $PWD/shop:/shop:ro \
#         -v $PWD/weights:/weights:ro chameleon --weights /weights --wardrobe /shop
FROM python:3.12-slim

RUN useradd --create-home --uid 1000 chameleon && mkdir /cache && chown chameleon /cache
WORKDIR /src
COPY setup.py README.md ./
COPY chameleon_jax chameleon_jax
COPY configs configs
COPY converters converters
COPY launch launch
RUN pip install --no-cache-dir ".[serve]" && rm -rf /src/*

USER chameleon
WORKDIR /home/chameleon
ENV JAX_PLATFORMS=cpu CHAMELEON_CACHE=/cache PYTHONUNBUFFERED=1
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=5m --interval=30s --timeout=5s CMD ["python", "-c", \
    "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["chameleon", "serve", "--host", "0.0.0.0", "--port", "8000"]
