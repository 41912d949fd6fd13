"""The image under `mlflow run .`, on a real Docker engine, as a person with a store of their own uses it.

PLW_TEST_IMAGE names the image, built from this tree (`make test-image` says so); without it nothing here runs.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
import yaml

from tests.stores import ROOT, make_store

IMAGE = os.environ.get("PLW_TEST_IMAGE", "")
pytestmark = pytest.mark.skipif(not IMAGE, reason="PLW_TEST_IMAGE names no image to test")

SMALL = {"max_records": 120, "epochs": 1, "limit": 4}
PERSON = 1000  # some user who is not root


class Project:
    """A copy of the project's folder that belongs to `uid`, who runs mlflow in it; a new one has no store yet."""

    def __init__(self, folder, uid):
        self.folder, self.uid = folder, uid
        for part in ("plw_mlflow", "entrypoints", "paper"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "image").mkdir()
        for part in ("MLproject", "conda.yaml", "image/entrypoint.py"):
            shutil.copy(ROOT / part, folder / part)
        subprocess.run(["chown", "-R", f"{uid}:{uid}", folder], check=True)
        self.uri = f"sqlite:///{folder}/mlflow.db"

    @property
    def client(self):
        return mlflow.MlflowClient(self.uri)

    def start(self, entry="main", *, arguments=(), cwd=None, environment=None, **parameters):
        """Begin `mlflow run . -e ENTRY -P NAME=VALUE ...`, with `arguments` of mlflow's own."""
        # The interpreter of the virtual environment may lie where only root can reach it.
        python = sys.executable if self.uid == 0 else "/usr/bin/python3"
        home = self.folder.parent / "home"
        home.mkdir(exist_ok=True)
        os.chown(home, self.uid, self.uid)
        environment = {
            "PATH": f"{Path(python).parent}:/usr/bin:/bin",
            "PYTHONPATH": sysconfig.get_path("purelib"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(home),
            "DOCKER_HOST": os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock"),
        } | (environment or {})
        given = [part for name, value in parameters.items() for part in ("-P", f"{name}={value}")]
        command = [python, "-m", "mlflow", "run", str(self.folder), "-e", entry, *arguments, *given]
        socket_file = Path(environment["DOCKER_HOST"].removeprefix("unix://"))
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command,
            cwd=cwd or self.folder,
            env=environment,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
            user=self.uid,
            group=self.uid,
            extra_groups=[socket_file.stat().st_gid],
        )

    def run(self, *given, status=0, **more):
        """Run to the end, which must be `status`; gives everything that was printed."""
        process = self.start(*given, **more)
        out, _ = process.communicate(timeout=300)
        assert process.returncode == status, out
        return out

    def newest(self):
        """The newest run."""
        everywhere = [experiment.experiment_id for experiment in self.client.search_experiments()]
        return self.client.search_runs(everywhere, order_by=["attributes.start_time DESC"])[0]

    def not_theirs(self):
        """Files and folders in the project that somebody else owns; but MLflow leaves one where this test loads."""
        ours = "registered_model_meta"
        return [path for path in self.folder.rglob("*") if path.lstat().st_uid != self.uid and path.name != ours]


def check_finished_cell(client, run, plw="0.242"):
    """A cell's run holds its parameters, curves and scores, and its registered model runs."""
    assert run.info.status == "FINISHED"
    assert run.data.params["plw"] == plw
    assert run.data.tags["plw.image"] == IMAGE
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 8
    assert {"score", "toy_choice/acc", "toy_short/acc", "toy_long/bleu", "eval/prompt_loss"} <= run.data.metrics.keys()
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"scores.csv", "profile.json", "config.json", "environment.json", "harness"} <= artifacts
    assert "checkpoints" not in artifacts  # the finished model is there instead
    assert "plw.checkpoint" not in run.data.tags
    name, _, version = run.data.tags["plw.model_version"].rpartition("/")
    model = mlflow.transformers.load_model(f"models:/{name}/{version}", return_type="components")["model"]
    assert torch.isfinite(model(torch.arange(5, 15)[None]).logits).all()


@contextmanager
def folder_for_anyone():
    """A folder for a project. pytest's own temporary ones are for nobody but the user who runs it."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        folder = Path(place) / "project"  # of plain letters: MLflow's own mounts take no others
        folder.mkdir()
        yield folder


@pytest.fixture(scope="module")
def project():
    with folder_for_anyone() as folder:
        yield Project(folder, PERSON)


@pytest.fixture
def new_project():
    with folder_for_anyone() as folder:
        yield lambda uid=PERSON: Project(folder, uid)


@pytest.fixture(scope="module")
def cell_run(project):
    out = project.run(plw="0.242", **SMALL)
    return project.newest(), out


def test_a_cell_is_in_the_default_store_and_belongs_to_the_person(project, cell_run, monkeypatch):
    run, out = cell_run
    monkeypatch.chdir(project.folder)
    mlflow.set_tracking_uri(project.uri)
    check_finished_cell(project.client, run)
    assert project.not_theirs() == []
    assert f"mlflow ui --backend-store-uri {project.uri}" in out  # the store by the name it has on the host
    assert "device: " in out
    assert "Traceback" not in out


def test_train_then_evaluate_by_run_id_gives_the_scores_of_main(project, cell_run):
    project.run("train", plw="0.242", max_records=120, epochs=1)
    trained = project.newest()
    project.run("evaluate", run_id=trained.info.run_id, limit=4)
    wrapper, scored = project.newest(), project.client.get_run(trained.info.run_id)
    assert wrapper.data.tags["plw.for_run"] == trained.info.run_id
    assert scored.data.metrics["score"] == cell_run[0].data.metrics["score"]
    assert project.not_theirs() == []


def test_prepare_reads_a_file_of_the_folder_and_writes_its_profile_there(project):
    records = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}"} for n in range(40)]
    (project.folder / "mine.jsonl").write_text("\n".join(map(json.dumps, records)))
    os.chown(project.folder / "mine.jsonl", PERSON, PERSON)
    project.run("prepare", dataset="mine.jsonl", output="found")
    assert json.loads((project.folder / "found" / "profile.json").read_text())["records"] == 40
    assert project.not_theirs() == []


def test_a_sweep_and_its_analysis(project, monkeypatch):
    project.run("sweep", plw="0,0.1,1", dataset="toy-short", **SMALL)
    sweep = next(run for run in project.client.search_runs(["0"]) if "plw.grid" in run.data.tags)
    cells = project.client.search_runs(["0"], f"tags.`mlflow.parentRunId` = '{sweep.info.run_id}'")
    assert {run.data.params["plw"]: run.info.status for run in cells} == dict.fromkeys(
        ("0.0", "0.1", "1.0"), "FINISHED"
    )
    project.run("analyze", run_id=sweep.info.run_id, output="fit")
    assert {"fit.json", "report.html"} <= {path.name for path in (project.folder / "fit").iterdir()}
    mlflow.set_tracking_uri(project.uri)
    monkeypatch.chdir(project.folder)
    regression = mlflow.pyfunc.load_model("models:/plw-regression/2")  # 1 is the sweep's own
    predicted = regression.predict(pd.DataFrame({"dataset": ["toy-short"], "plw": [0.1]}))
    assert 0 < predicted["score"][0] < 1
    assert project.not_theirs() == []


def test_roots_store_is_roots(new_project, monkeypatch):
    project = new_project(0)
    out = project.run(plw="0.242", **SMALL)
    assert "runs as root, since" in out
    mlflow.set_tracking_uri(project.uri)
    monkeypatch.chdir(project.folder)
    check_finished_cell(project.client, project.newest())
    assert project.not_theirs() == []


@contextmanager
def serving(command, port, folder, uid, environment):
    """A server in a process of its own, until the block ends."""
    with (folder / f"{port}.log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, user=uid, group=uid, extra_groups=[]
        )
        try:
            for _ in range(120):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.5)
            else:
                raise AssertionError((folder / f"{port}.log").read_text())
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


AWS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "a-secret", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def tracking_server(project, monkeypatch, *, s3_style):
    """A tracking server beside the project; gives the environment in which mlflow uses it."""
    import boto3

    place = project.folder.parent / "server"
    place.mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": str(place), "PYTHONPATH": sysconfig.get_path("purelib")} | AWS
    port, s3_port = free_port(), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{place}/server.db"]
    with serving([sys.executable, "-m", "moto.server", "-p", str(s3_port)], s3_port, place, 0, environment) as s3:
        if s3_style:
            environment["MLFLOW_S3_ENDPOINT_URL"] = s3
            for name, value in (AWS | {"MLFLOW_S3_ENDPOINT_URL": s3}).items():
                monkeypatch.setenv(name, value)
            boto3.client("s3", endpoint_url=s3).create_bucket(Bucket="artifacts")
            command += ["--no-serve-artifacts", "--default-artifact-root", "s3://artifacts/runs"]
        with serving(command, port, place, 0, environment) as uri:
            project.uri = uri
            given = {name: value for name, value in environment.items() if name.startswith(("AWS", "MLFLOW"))}
            yield given | {"MLFLOW_TRACKING_URI": uri}


@pytest.mark.parametrize("s3_style", [False, True])
def test_a_tracking_server_gets_everything(new_project, monkeypatch, s3_style):
    project = new_project()
    with tracking_server(project, monkeypatch, s3_style=s3_style) as environment:
        project.run(plw="0.242", arguments=["-A", "network=host"], environment=environment, **SMALL)
        mlflow.set_tracking_uri(project.uri)
        (run,) = project.client.search_runs(["0"])
        check_finished_cell(project.client, run)
        assert run.info.artifact_uri.startswith("s3://artifacts/runs" if s3_style else "mlflow-artifacts:/")
    assert project.not_theirs() == []


def test_a_killed_container_goes_on_from_the_checkpoint_in_the_default_store(new_project):
    project = new_project()
    os.chown(project.folder / make_store(project.folder).rpartition("/")[2], PERSON, PERSON)
    check_it_goes_on(project, "SIGKILL")
    assert not list(project.folder.glob("mlruns/0/*/artifacts/checkpoints/*"))


def test_a_terminated_container_goes_on_from_the_checkpoint_in_an_s3_style_store(new_project, monkeypatch):
    project = new_project()
    with tracking_server(project, monkeypatch, s3_style=True) as environment:
        check_it_goes_on(project, "SIGTERM", arguments=["-A", "network=host"], environment=environment)


def check_it_goes_on(project, how, **given):
    """A cell whose container gets a signal after its first checkpoint ends as if nothing had been."""
    given |= {"plw": "0.242", "epochs": 6, "limit": 4, "save_every": 40, "eval_every": 40}
    stopped = project.start(**given)
    while not (stored := project.client.search_runs(["0"], "tags.`plw.checkpoint` LIKE '%'")):
        assert stopped.poll() is None, stopped.communicate()[0]
        time.sleep(0.5)
    containers = subprocess.run(
        ["docker", "ps", "-q", "--filter", f"volume={project.folder}"], capture_output=True, text=True, check=True
    ).stdout.split()
    (container,) = containers
    subprocess.run(["docker", "kill", "--signal", how, container], check=True, capture_output=True)
    stopped.communicate(timeout=60)
    shutil.rmtree(project.folder / "checkpoints")  # as on another machine: the store alone has it now
    out = project.run(**given)
    assert "went on from the checkpoint of step" in out
    first, second = stored[0].info.run_id, project.newest()
    assert second.info.status == "FINISHED"
    assert second.data.tags["plw.resumed_from"] == first
    steps = [point.step for point in project.client.get_metric_history(second.info.run_id, "train/loss")]
    assert steps == list(range(1, len(steps) + 1))  # the curve is whole
    earlier = project.client.get_run(first)
    assert earlier.data.tags["plw.superseded_by"] == second.info.run_id
    assert "plw.checkpoint" not in earlier.data.tags | second.data.tags
    for run_id in (first, second.info.run_id):
        assert "checkpoints" not in {item.path for item in project.client.list_artifacts(run_id)}
    assert project.not_theirs() == []


def test_an_image_of_other_code_is_refused_unless_allowed(new_project):
    project = new_project()
    with (project.folder / "plw_mlflow" / "training" / "loss.py").open("a") as code:
        code.write("# a change\n")
    out = project.run("prepare", status=1)
    assert "was built from other code than" in out
    assert project.newest().info.status == "FAILED"
    out = project.run("prepare", allow_stale_image="true")
    assert "warning: image" in out
    assert project.newest().data.tags["plw.stale_image"] == "true"


def test_a_store_that_is_not_mounted_is_refused(new_project):
    project = new_project()
    elsewhere = project.folder.parent / "elsewhere"
    elsewhere.mkdir()
    os.chown(elsewhere, PERSON, PERSON)
    out = project.run("prepare", cwd=elsewhere, status=1)
    assert (
        f"is not mounted in the container; start mlflow in the project's folder, or mount it with -A v={elsewhere}"
        in out
    )
    project.run("prepare", arguments=["-A", f"v={elsewhere}:{elsewhere}"], cwd=elsewhere)


def docker_run(*arguments):
    return subprocess.run(["docker", "run", "--rm", *arguments], capture_output=True, text=True)


def test_the_image_says_what_it_is():
    found = subprocess.run(["docker", "inspect", IMAGE], capture_output=True, text=True, check=True)
    labels = json.loads(found.stdout)[0]["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == IMAGE.partition(":")[2]
    assert len(labels["org.opencontainers.image.revision"].removesuffix("-dirty")) == 40
    assert labels["org.opencontainers.image.licenses"] == "MIT"
    assert labels["org.opencontainers.image.base.name"]
    assert re.fullmatch("sha256:[0-9a-f]{64}", labels["org.opencontainers.image.base.digest"])


def test_the_container_alone_warns_that_results_are_lost_and_takes_any_user():
    done = docker_run("--user", "4321", IMAGE, "python", "-m", "entrypoints.prepare", "--max-records", "20")
    assert done.returncode == 0, done.stderr
    assert "MLFLOW_TRACKING_URI is not set" in done.stderr
    assert "generation ratio" in done.stdout


WHO = "import os, sys; print(os.getresuid(), os.getresgid(), os.getgroups(), open('/proc/self/status').read())"


def test_a_container_without_mounts_is_nobodys_root():
    done = docker_run(IMAGE, "python", "-c", WHO)
    assert done.stdout.startswith("(10001, 10001, 10001) (10001, 10001, 10001) []"), done.stderr
    assert "CapEff:\t0000000000000000" in done.stdout
    refused = docker_run("--cap-drop", "ALL", IMAGE, "python", "-c", WHO)
    assert refused.returncode == 1
    assert "start the container with --user 10001:10001" in refused.stderr
    assert docker_run("--cap-drop", "ALL", "--user", "10001:10001", IMAGE, "python", "-c", WHO).returncode == 0


def test_a_volume_is_worked_in_as_its_owner(tmp_path):
    """As a provider mounts one: named by PLW_FOLDER, it needs neither MLflow nor --user."""
    for owner in (0, PERSON):
        folder = tmp_path / f"{owner}"
        folder.mkdir()
        os.chown(folder, owner, owner)
        mount = ["--volume", f"{folder}:/results", "--env", "PLW_FOLDER=/results"]
        command = ["python", "-m", "entrypoints.prepare", "--max-records", "20", "--output", "found"]
        done = docker_run(*mount, IMAGE, *command)
        assert done.returncode == 0, done.stderr
        assert (folder / "found" / "profile.json").stat().st_uid == owner


def test_nobody_but_root_can_change_what_runs_and_what_anyone_writes_is_theirs():
    """Files and folders that every user may write to: none but sticky folders; and nothing of a user's in the code."""
    done = docker_run(
        "--entrypoint",
        "sh",
        IMAGE,
        "-c",
        "find / -xdev -perm -0002 ! -type l ! -perm -1000 -print;"
        "find /plw_mlflow /opt ! -user root -print; find /plw_mlflow /opt -perm /0022 ! -type l -print;"
        "echo; find / -xdev -type d -perm -1002 -print",
    )
    assert done.returncode == 0, done.stderr
    wrong, _, sticky = done.stdout.partition("\n")
    assert wrong == ""
    assert set(sticky.split()) <= {"/tmp", "/var/tmp", "/run/lock", "/mlflow/tmp", "/home/plw"}


def test_the_kubernetes_job_runs_under_what_its_template_grants(new_project, monkeypatch):
    """kubernetes/job.yaml as Docker's options, on an image made as `mlflow run --build-image` makes it."""
    project = new_project(0)
    pod = yaml.safe_load((ROOT / "kubernetes" / "job.yaml").read_text())["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    rights = pod["securityContext"] | container["securityContext"]
    options = ["--user", f"{rights['runAsUser']}:{rights['runAsGroup']}"]
    options += [f"--cap-drop={capability}" for capability in rights["capabilities"]["drop"]]
    options += ["--read-only"] * rights["readOnlyRootFilesystem"]
    options += ["--security-opt=no-new-privileges"] * (not rights["allowPrivilegeEscalation"])
    for mount in container["volumeMounts"]:
        options += ["--tmpfs", f"{mount['mountPath']}:rw,exec,mode=0777"]
    code = "/mlflow/projects/code"
    (project.folder / "Dockerfile").write_text(f"FROM {IMAGE}\nCOPY . {code}/\nWORKDIR {code}/\n")
    made = subprocess.run(["docker", "build", "--quiet", project.folder], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    given = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    command = ["-m", "entrypoints.main", "--plw=0.242", "--output=output/cell", *given]
    with tracking_server(project, monkeypatch, s3_style=False) as environment:
        for name in ("MLFLOW_TRACKING_URI", *AWS):
            options += ["--env", f"{name}={environment[name]}"]
        options += ["--network", "host", "--entrypoint", "python"]
        done = docker_run(*options, made.stdout.strip(), *command)
        subprocess.run(["docker", "image", "rm", made.stdout.strip()], check=True, capture_output=True)
        assert done.returncode == 0, done.stderr + done.stdout
        mlflow.set_tracking_uri(project.uri)
        check_finished_cell(project.client, project.newest())


def test_a_command_that_is_not_there():
    done = docker_run(IMAGE, "nosuch")
    assert done.returncode == 127
    assert done.stderr.splitlines()[-1] == "error: nosuch cannot be run: No such file or directory"


def test_no_secret_of_the_build_is_in_a_layer_or_in_the_history(tmp_path):
    """PLW_TEST_SECRETS: strings in the secrets that the build was given, comma-separated."""
    if "PLW_TEST_SECRETS" not in os.environ:
        pytest.skip("PLW_TEST_SECRETS names no secret that the build was given")
    secrets = os.environ["PLW_TEST_SECRETS"].split(",")
    assert all(secrets)
    # What is there is found: in the history, in a layer.
    assert find_in_image("org.opencontainers.image.version", tmp_path)
    first_line = (ROOT / "plw_mlflow" / "environment" / "provenance.py").read_text().splitlines()[0]
    assert find_in_image(first_line, tmp_path)
    assert [secret for secret in secrets if find_in_image(secret, tmp_path)] == []


def find_in_image(wanted, folder):
    """Whether a string is anywhere in the image: its layers' files, its configuration, its history."""
    archive = folder / "image.tar"
    if not archive.exists():
        subprocess.run(["docker", "save", "--output", archive, IMAGE], check=True)
    history = subprocess.run(["docker", "history", "--no-trunc", IMAGE], capture_output=True, text=True, check=True)
    return wanted in history.stdout or subprocess.run(["grep", "-q", "-a", "-F", wanted, archive]).returncode == 0
