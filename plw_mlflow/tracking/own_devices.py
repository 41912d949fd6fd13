"""Own devices: MLflow's system metrics of GPUs, of those that this process computes on alone.

MLflow's monitor watches every GPU that the driver has, whatever CUDA_VISIBLE_DEVICES says, and has no setting for it. A
cell that shares a machine with others would be shown with their load.
"""

from __future__ import annotations

import warnings
from typing import Any

from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
from mlflow.system_metrics import system_metrics_monitor
from mlflow.system_metrics.metrics import gpu_monitor

from plw_mlflow.errors import first_line


class OwnGPUs(gpu_monitor.GPUMonitor):
    """MLflow's monitor of the GPUs of this process: `gpu_0` is the process's own first one."""

    def __init__(self) -> None:
        super().__init__()
        nvml: Any = gpu_monitor.pynvml
        try:
            # By their ids, as CUDA numbers GPUs in another order than the driver.
            self.gpu_handles = [nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in _ids()]
        except Exception as error:  # a part of a GPU (MIG), say, has no metrics of its own
            warnings.warn(f"the system metrics are of all GPUs of this machine ({first_line(error)})", stacklevel=2)
        self.num_gpus = len(self.gpu_handles)


def restrict() -> None:
    """Have MLflow watch the GPUs of this process alone, if it is to log system metrics."""
    if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():
        system_metrics_monitor.GPUMonitor = OwnGPUs  # type: ignore[misc]


def _ids() -> list[str]:
    """What the driver calls the GPUs that this process sees, in the process's order."""
    import torch

    return [f"GPU-{torch.cuda.get_device_properties(number).uuid}" for number in range(torch.cuda.device_count())]
