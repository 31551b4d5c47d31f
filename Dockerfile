# One image for every cluster, of the pinned package set:
#   docker build -t mbcnet-rec .                        CPU
#   docker build -t mbcnet-rec --build-arg SET=gpu .    CUDA 13: the wheels bring the libraries, the host its driver
#   docker build -t mbcnet-serve --build-arg SET=serve --target serve .    the scorer alone; examples/serve.yaml runs it
FROM python:3.11.13-slim-bookworm AS mbcnet

ARG SET=cpu
# The NVIDIA runtime reads the last two; other runtimes ignore them
ENV PATH=/opt/mbcnet/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONSAFEPATH=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /src
COPY requirements requirements
RUN python -m venv /opt/mbcnet \
    && pip install --no-cache-dir --disable-pip-version-check -r requirements/${SET}.txt

COPY pyproject.toml README.md ./
COPY data data
COPY sharding sharding
COPY mbcnet_rec mbcnet_rec
COPY launch launch
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation . \
    && rm -rf build

RUN groupadd --gid 10001 mbcnet \
    && useradd --uid 10001 --gid 10001 --create-home mbcnet \
    && install --directory --owner=10001 --group=10001 /storage
USER 10001:10001

FROM mbcnet AS serve
EXPOSE 8080
CMD ["mbcnet", "serve", "/models/current", "--host", "0.0.0.0"]

FROM mbcnet
# Data, configs and run folders: mount a file system here that every host sees
WORKDIR /storage
CMD ["mbcnet", "--help"]
