# The image MLproject runs in. torch's wheel from the index brings its CUDA libraries along, so the base needs only
# Python; the host needs NVIDIA's driver and container toolkit. Without a GPU the same image runs on the CPU.
ARG BASE=python:3.11-slim
FROM ${BASE}

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1 \
    PYTHONPATH=/plw_mlflow
WORKDIR /plw_mlflow

# Before the code, so that a change of code does not install everything again.
COPY conda.yaml .
RUN sed -n 's/^ *- \([^ ]*==[^ ]*\)$/\1/p' conda.yaml > /tmp/requirements.txt \
    && pip install --no-cache-dir --requirement /tmp/requirements.txt \
    && rm /tmp/requirements.txt

COPY plw_mlflow plw_mlflow
COPY entrypoints entrypoints

ARG COMMIT=""
ARG IMAGE=""
ENV PLW_GIT_COMMIT=${COMMIT} PLW_IMAGE=${IMAGE}
CMD ["python", "-m", "entrypoints.main", "--help"]
