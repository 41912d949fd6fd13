# The image MLproject runs in. torch's wheel from the index brings its CUDA libraries along, so the base needs only
# Python 3.11; the host needs NVIDIA's driver and container toolkit. Without a GPU the same image runs on the CPU.
# Needs BuildKit, for mounts that leave nothing behind in a layer.
ARG BASE=python:3.11-slim

FROM ${BASE} AS install
RUN python3 -m venv /opt/venv
COPY conda.yaml /
# An index with builds of torch that the ordinary one lacks: make image-cpu names that of the CPU builds.
ARG TORCH_INDEX=""
# Wheels in image/wheels are preferred to an index's. The secrets are a machine's own settings, where it needs any.
RUN --mount=type=bind,source=image/wheels,target=/wheels \
    --mount=type=secret,id=pip_config,target=/etc/pip.conf \
    --mount=type=secret,id=certificates,target=/run/certificates.pem \
    sed '/what checks and tests it/,/what those need/d' /conda.yaml \
        | sed -n 's/^ *- \([^ ]*==[^ ]*\)$/\1/p' > /requirements.txt \
    && if [ -s /run/certificates.pem ]; then export PIP_CERT=/run/certificates.pem; fi \
    && /opt/venv/bin/pip install --no-cache-dir --find-links /wheels ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        --requirement /requirements.txt

# The code, readable for whoever the container runs as, whatever the checkout's umask was.
FROM ${BASE} AS code
COPY conda.yaml /code/
COPY image/entrypoint.py /code/image/
COPY entrypoints /code/entrypoints
COPY plw_mlflow /code/plw_mlflow
COPY paper /code/paper
RUN chmod -R a+rX /code

FROM ${BASE}
# MLflow mounts its default store as the file /mlflow/tmp/mlruns: whoever the container runs as must be able to write
# beside it. The same for a home, as no user of the image's own is needed.
RUN mkdir -p /mlflow/tmp /home/plw && chmod 1777 /mlflow/tmp /home/plw
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
ENV PLW_GIT_COMMIT=${COMMIT} PLW_IMAGE=${IMAGE}
LABEL org.opencontainers.image.title="plw_mlflow" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}" \
      org.opencontainers.image.licenses="MIT"
ENTRYPOINT ["python", "/plw_mlflow/image/entrypoint.py"]
CMD ["python", "-m", "entrypoints.main", "--help"]
