"""Are the GPUs that MLflow watches those of this process? With a driver and a CUDA that only seem to be there."""

import sys
from types import SimpleNamespace

import pytest
import torch
from mlflow.system_metrics import system_metrics_monitor
from mlflow.system_metrics.metrics import gpu_monitor

from plw_mlflow.tracking import own_devices


@pytest.fixture
def machine(monkeypatch):
    """Four GPUs, a, b, c and d, of which this process sees d and b."""
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 4,
        nvmlDeviceGetHandleByIndex="abcd".__getitem__,
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-b": "b", "GPU-d": "d"}[uuid],
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=ord(handle) * 1e6, total=1e9),
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=1),
        nvmlDeviceGetPowerUsage=lambda handle: 1000,
        nvmlDeviceGetEnforcedPowerLimit=lambda handle: 2000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(gpu_monitor, "pynvml", nvml, raising=False)
    monkeypatch.setattr(system_metrics_monitor, "GPUMonitor", gpu_monitor.GPUMonitor)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid="db"[number]))
    return nvml


def watched(monkeypatch, wanted):
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", wanted)
    own_devices.restrict()
    monitor = system_metrics_monitor.GPUMonitor()
    monitor.collect_metrics()
    found = monitor.aggregate_metrics()
    return [chr(round(value)) for name, value in found.items() if name.endswith("memory_usage_megabytes")]


def test_mlflow_watches_the_gpus_of_this_process_in_its_order(machine, monkeypatch):
    assert watched(monkeypatch, "false") == [*"abcd"]
    assert watched(monkeypatch, "true") == [*"db"]


def test_where_the_driver_does_not_know_them_all_are_watched_with_a_warning(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid="part"))
    with pytest.warns(UserWarning, match="system metrics are of all GPUs"):
        assert watched(monkeypatch, "true") == [*"abcd"]
