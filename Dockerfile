# The image MLproject runs in. torch's wheel from the index brings its CUDA libraries along, so the base needs only
# Python 3.11; the host needs NVIDIA's driver and container toolkit. Without a GPU the same image runs on the CPU.
# Needs BuildKit, for mounts that leave nothing behind in a layer.
# make image BASE=python:3.11-slim@sha256:... pins the base, and labels the image with the digest of the one it took.
ARG BASE=python:3.11-slim

FROM ${BASE} AS install
RUN python3 -m venv /opt/venv
COPY conda.yaml /build/
COPY image/hashes.py /build/image/
COPY image/requirements /build/image/requirements
# Which torch: cuda or cpu. The ordinary index lacks the CPU builds: make image-cpu names one that has them.
ARG TORCH=cuda
ARG TORCH_INDEX=""
# Only files of the hashes in image/requirements/ are installed, wherever they come from: an index, or image/wheels. The
# lists are whole, as pip check finds, so that nothing is resolved. Some packages are built from source here; that takes
# the listed setuptools, and not whatever the index holds today.
# The secrets are a machine's own settings, where it needs any.
RUN --mount=type=bind,source=image/wheels,target=/wheels \
    --mount=type=secret,id=pip_config,target=/etc/pip.conf \
    --mount=type=secret,id=certificates,target=/run/certificates.pem \
    python3 /build/image/hashes.py check \
    && cd /build/image/requirements && grep '^setuptools==' packages.txt > setuptools.txt \
    && if [ -s /run/certificates.pem ]; then export PIP_CERT=/run/certificates.pem; fi \
    && install() { /opt/venv/bin/pip install --no-cache-dir --no-deps --require-hashes --find-links /wheels "$@"; } \
    && install --requirement setuptools.txt \
    && install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --use-pep517 --no-build-isolation \
        --requirement packages.txt --requirement "$TORCH.txt" \
    && /opt/venv/bin/pip check

# The code, readable for whoever the container runs as, whatever the checkout's umask was.
FROM ${BASE} AS code
COPY conda.yaml /code/
COPY image/entrypoint.py /code/image/
COPY entrypoints /code/entrypoints
COPY plw_mlflow /code/plw_mlflow
COPY paper /code/paper
RUN chmod -R a+rX /code

FROM ${BASE}
# Root becomes plw where nothing is mounted whose owner it could become (image/entrypoint.py). MLflow mounts its default
# store as the file /mlflow/tmp/mlruns: whoever the container runs as must be able to write beside it, and in a home.
RUN groupadd --gid 10001 plw \
    && useradd --uid 10001 --gid plw --no-log-init --no-create-home --home-dir /home/plw --shell /usr/sbin/nologin plw \
    && mkdir -p /mlflow/tmp /home/plw && chown plw:plw /home/plw && chmod 1777 /mlflow/tmp /home/plw
ENV HOME=/home/plw \
    PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/plw_mlflow \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    GIT_PYTHON_REFRESH=quiet \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /plw_mlflow
COPY --from=install /opt/venv /opt/venv
# Last, so that a change of code is a layer of a few megabytes.
COPY --from=code /code ./

ARG VERSION=""
ARG COMMIT=""
ARG IMAGE=plw_mlflow
ARG BASE
ARG BASE_DIGEST=""
ENV PLW_GIT_COMMIT=${COMMIT} PLW_IMAGE=${IMAGE}
LABEL org.opencontainers.image.title="plw_mlflow" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}" \
      org.opencontainers.image.base.name="${BASE}" \
      org.opencontainers.image.base.digest="${BASE_DIGEST}" \
      org.opencontainers.image.licenses="MIT"
ENTRYPOINT ["python", "/plw_mlflow/image/entrypoint.py"]
CMD ["python", "-m", "entrypoints.main", "--help"]
