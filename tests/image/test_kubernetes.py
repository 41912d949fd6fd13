"""The job `mlflow run . --backend kubernetes` sends: kubernetes/job.yaml, filled in by MLflow; no cluster is needed."""

import json
import re
import sys
from dataclasses import fields
from types import ModuleType

import click
import pytest

from plw_mlflow.command_line.options import options
from plw_mlflow.config import CONFIGS, LISTABLE, spell
from tests.stores import ROOT

NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123: what Kubernetes takes as a name


@pytest.fixture
def fill_in(monkeypatch, tmp_path):
    """The job of an entry point, as MLflow sends it to the cluster."""
    # MLflow's module imports the cluster's client, which conda.yaml leaves out and filling in does not use.
    for name in ("kubernetes", "kubernetes.config", "kubernetes.config.config_exception"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["kubernetes.config.config_exception"], "ConfigException", Exception, raising=False)
    from mlflow import projects
    from mlflow.projects import kubernetes

    monkeypatch.chdir(ROOT)
    config = projects._parse_kubernetes_config(json.loads((ROOT / "kubernetes" / "backend.json").read_text()))
    project = projects.load_project(".")

    def job(entry):
        command = kubernetes._get_run_command(projects.get_entry_point_command(project, entry, {}, str(tmp_path)))
        environment = {"MLFLOW_RUN_ID": "a-run", "MLFLOW_TRACKING_URI": "http://localhost:5000"}
        tag = f"{config['repository-uri']}:0123456"
        return kubernetes._get_kubernetes_job_definition(
            project.name, tag, "sha256:89ab", command, environment, config["kube-job-template"]
        )

    return job


def test_kubernetes_takes_the_names(fill_in):
    job = fill_in("main")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert NAME.fullmatch(job["metadata"]["name"])
    assert NAME.fullmatch(container["name"])


@pytest.mark.parametrize("entry", CONFIGS)
def test_the_command_means_what_the_same_mlflow_run_means_elsewhere(fill_in, entry):
    # Kubernetes runs it without a shell, though MLflow has quoted it for one: unset is '' there.
    (container,) = fill_in(entry)["spec"]["template"]["spec"]["containers"]
    python, m, module, *arguments = container["command"]
    assert (python, m, module) == ("python", "-m", f"entrypoints.{entry}")
    known = [decorate(lambda: None).__click_params__[0] for decorate in options(CONFIGS[entry])]
    given = click.Command(entry, params=known).make_context(entry, arguments).params
    # A sweep's own lists are read by its config.
    lists = LISTABLE if entry == "sweep" else ()
    assert given == {
        field.name: spell(field.default) if field.name in lists and field.default is not None else field.default
        for field in fields(CONFIGS[entry])
    }


def test_what_the_template_asks_for_is_left(fill_in, monkeypatch):
    monkeypatch.setenv("KUBE_MLFLOW_TRACKING_URI", "http://mlflow.example.com")
    pod = fill_in("main")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "registry.example.com/plw_mlflow:0123456@sha256:89ab"
    assert container["envFrom"] == [{"secretRef": {"name": "plw-mlflow", "optional": True}}]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy wants
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment == {"MLFLOW_RUN_ID": "a-run", "MLFLOW_TRACKING_URI": "http://mlflow.example.com"}


def test_the_pod_may_do_no_more_than_a_cell_needs(fill_in):
    """What the Pod Security Standard "restricted" demands, and bounds on time, memory and disk."""
    job = fill_in("main")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["automountServiceAccountToken"] is False
    assert {"cpu", "memory", "ephemeral-storage"} <= container["resources"]["limits"].keys()
    assert job["spec"]["activeDeadlineSeconds"] > 0
    # Volumes of the restricted kinds, each mounted somewhere, and none from the machine the pod is on.
    assert [volume.keys() for volume in pod["volumes"]] == [{"name", "emptyDir"}] * len(container["volumeMounts"])
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}


def test_the_pod_runs_as_the_images_own_user_and_can_write_where_a_cell_does(fill_in):
    from mlflow.projects.utils import MLFLOW_DOCKER_WORKDIR_PATH

    pod = fill_in("main")["spec"]["template"]["spec"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    (user,) = re.findall(r"useradd --uid (\d+) --gid plw", dockerfile)
    (group,) = re.findall(r"groupadd --gid (\d+) plw", dockerfile)
    (home,) = re.findall(r"ENV HOME=(\S+)", dockerfile)
    assert pod["securityContext"]["runAsUser"] == int(user) != 0
    assert pod["securityContext"]["runAsGroup"] == pod["securityContext"]["fsGroup"] == int(group)
    checkpoints = f"{MLFLOW_DOCKER_WORKDIR_PATH.rstrip('/')}/{CONFIGS['main']().checkpoint_dir}"
    assert {"/tmp", home, checkpoints} <= {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
