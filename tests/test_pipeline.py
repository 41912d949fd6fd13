"""The entry points as a person runs them: in processes of their own, on the toy laboratory, into a store on disk."""

import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch

from plw_mlflow import cell, tracking
from plw_mlflow.analysis import questions
from plw_mlflow.config import EvaluateConfig, MainConfig, TrainConfig
from plw_mlflow.data import prepare
from plw_mlflow.data.pieces import Segment
from plw_mlflow.environment.outputs import LIST, LOCK
from plw_mlflow.models import adapters, pretrained
from plw_mlflow.training import checkpoints
from tests.stores import ROOT, Place

SMALL = ("--max-records", "120", "--epochs", "1", "--limit", "4")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("store"))


@pytest.fixture
def new_place(tmp_path):
    return Place(tmp_path)


@pytest.fixture(scope="module")
def cell_run(place):
    """A cell made by `main`: its MLflow run, what was printed, and the files it left."""
    out, _ = place.run("main", "--plw", "0.242", *SMALL, "--output", "found")
    return place.runs()[0], out, place.folder / "found"


def test_main_puts_everything_on_one_run(place, cell_run):
    run, out, found = cell_run
    assert run.info.status == "FINISHED"
    assert {
        "plw": "0.242",
        "model": "toy",
        "dataset": "toy-short",
        "seed": "1234",
        "method": "full",
    }.items() <= run.data.params.items()
    assert run.data.params.keys() == {field for field in MainConfig.__dataclass_fields__}
    used = {one.dataset.name: one for one in run.inputs.dataset_inputs}
    assert used.keys() == {"toy-short", "toy_choice", "toy_short", "toy_long"}
    assert run.data.tags["plw.data_sha256"].startswith(used["toy-short"].dataset.digest)
    assert json.loads((found / "profile.json").read_text())["sources"][0]["sha256"] == run.data.tags["plw.data_sha256"]
    steps = [point.step for point in place.client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == list(range(1, len(steps) + 1))
    curves = ("loss", "prompt_loss", "completion_loss", "learning_rate", "grad_norm")
    curves += ("tokens_per_second", "padding_share", "peak_memory_mib", "mfu")
    assert {f"train/{curve}" for curve in curves} | {
        "eval/prompt_loss",
        "eval/completion_loss",
    } <= run.data.metrics.keys()
    assert run.info.run_id in out
    assert "bare float32 products on this CPU" in run.data.tags["plw.mfu_peak"]
    assert "mlflow ui --backend-store-uri" in out


def test_the_prompts_share_is_that_of_the_segments_that_the_cell_is_trained_on(cell_run):
    """By the toy's preset, the sums of a step's weights are divided once, so that the tokens of all examples count."""
    run, _, _ = cell_run
    prepared = prepare.run("toy-short", pretrained.load_tokenizer("toy"), MainConfig(max_records=120))
    segments = np.concatenate([example.segment[1:] for example in prepared.training])  # nothing predicts the first
    completion = np.count_nonzero(segments == Segment.COMPLETION)
    prompt = 0.242 * (len(segments) - completion)
    assert run.data.metrics["prompt_share"] == pytest.approx(prompt / (prompt + completion), rel=1e-12)


def test_scores_are_metrics_and_rows_of_the_score_table(cell_run):
    run, _, found = cell_run
    rows = pd.read_csv(found / "scores.csv")
    assert list(rows.columns[:7]) == ["model", "dataset", "plw", "seed", "task", "metric", "score"]
    assert list(rows["task"]) == ["toy_choice", "toy_short", "toy_long"]
    assert (rows["n"] == 4).all()
    for row in rows.itertuples():
        assert run.data.metrics[f"{row.task}/{row.metric}"] == pytest.approx(row.score)
    assert run.data.metrics["score"] == pytest.approx(rows["score"].mean())


def test_the_model_is_registered_and_the_scores_are_the_models(place, cell_run):
    run, _, _ = cell_run
    version = place.client.get_model_version("plw-toy-toy-short", "1")
    assert version.tags["plw.plw"] == "0.242"
    (output,) = run.outputs.model_outputs
    model = place.client.get_logged_model(output.model_id)
    shown = {metric.key: metric.value for metric in model.metrics}
    assert shown["score"] == run.data.metrics["score"]
    assert shown["train/loss"] == run.data.metrics["train/loss"]  # of the last step
    assert shown["eval/completion_loss"] == run.data.metrics["eval/completion_loss"]
    measured_on = {metric.key: metric.dataset_name for metric in model.metrics}
    assert (measured_on["toy_long/bleu"], measured_on["train/loss"], measured_on["score"]) == ("toy_long", None, None)


@pytest.mark.parametrize("method", ["full", "lora", "dora"])
def test_logged_model_loads_in_a_new_process_with_the_trained_logits(new_place, method, monkeypatch):
    monkeypatch.chdir(new_place.folder)
    mlflow.set_tracking_uri(new_place.uri)
    tokens = torch.arange(5, 45).view(2, 20)
    trained = []
    merge = adapters.merge

    @torch.no_grad()
    def watched(model, *options):
        trained.append(model(tokens).logits)  # before adapters are merged
        merged = merge(model, *options)
        trained.append(merged(tokens).logits)
        return merged

    monkeypatch.setattr(adapters, "merge", watched)
    config = TrainConfig(method=method, max_records=120, epochs=1, output=new_place.folder / "out")
    with tracking.open_run(config, "test") as run:
        cell.lead(config, run)
    script = (
        "import mlflow, torch; "
        "model = mlflow.transformers.load_model('models:/plw-toy-toy-short/1', return_type='components')['model']; "
        "torch.save(model(torch.arange(5, 45).view(2, 20)).logits, 'logits.pt')"
    )
    subprocess.run([sys.executable, "-c", script], cwd=new_place.folder, env=new_place.environment(), check=True)
    loaded = torch.load(new_place.folder / "logits.pt")
    as_trained, as_merged = trained
    # What is logged of an adapter is put on the base again, and not merged.
    torch.testing.assert_close(loaded, as_merged if method == "full" else as_trained, atol=0, rtol=0)
    # To 1e-5 of the largest logit, which is near 15: each of the two is itself 9e-6 off a float64 computation.
    torch.testing.assert_close(as_merged, as_trained, atol=1e-5 * as_trained.abs().max().item(), rtol=0)
    base = pretrained.load("toy")(tokens).logits
    assert (loaded - base).abs().max() > 0.01  # it is not the base that came back


def test_a_model_has_the_chat_template_it_was_trained_with_and_knows_its_end(new_place, monkeypatch):
    monkeypatch.chdir(new_place.folder)
    mlflow.set_tracking_uri(new_place.uri)
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ pad_token }}{% endfor %}"
    Path("mine.jinja").write_text(source)
    config = TrainConfig(template="mine.jinja", dataset="toy-long", invert=True, max_records=20, epochs=1)
    with tracking.open_run(config, "test") as run:
        cell.lead(config, run)
    model, tokenizer = tracking.load_model(run)
    assert tokenizer.chat_template == source
    assert model.generation_config.eos_token_id == [tokenizer.pad_token_id, tokenizer.eos_token_id]
    (registered,) = new_place.client.search_registered_models()
    assert registered.name == "plw-toy-toy-long-inverted"


def test_evaluate_adds_scores_to_the_cells_run(place, cell_run):
    run, _, _ = cell_run
    before = len(place.runs())
    place.run("evaluate", "--run-id", run.info.run_id, "--tasks", "toy_choice", "--limit", "4", "--output", "again")
    assert len(place.runs()) == before
    after = place.client.get_run(run.info.run_id)
    assert after.info.status == "FINISHED"
    assert after.data.metrics["score"] == run.data.metrics["score"]  # the other tasks still count
    history = place.client.get_metric_history(run.info.run_id, "toy_choice/acc")
    assert len(history) == 2
    assert history[0].value == history[1].value


def test_train_then_evaluate_gives_the_scores_of_main(place, cell_run):
    run, _, _ = cell_run
    place.run("train", "--plw", "0.242", *SMALL[:4])
    trained = place.runs()[0]
    assert trained.data.tags["plw.cell"] == run.data.tags["plw.cell"]
    place.run("evaluate", "--run-id", trained.info.run_id, "--limit", "4")
    scores = {name: value for name, value in run.data.metrics.items() if name.startswith(("toy_", "score"))}
    again = place.client.get_run(trained.info.run_id).data.metrics
    assert {name: again[name] for name in scores} == pytest.approx(scores)


def test_scores_of_tasks_that_say_nothing_of_ones_own_data_are_said_to(new_place, monkeypatch, capsys):
    monkeypatch.chdir(new_place.folder)
    mlflow.set_tracking_uri(new_place.uri)
    rows = [{"instruction": f"Add {n} and 1.", "output": f"{n + 1}"} for n in range(20)]
    Path("sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = TrainConfig(dataset="sums.jsonl", epochs=1, validation_share=0.2)
    with tracking.open_run(config, "test") as run:
        cell.lead(config, run)
    cell.score_model(EvaluateConfig(run_id=run.id, tasks="toy_choice", limit=2))
    assert "toy_choice asks about the toy laboratory's invented people alone" in capsys.readouterr().out


@pytest.mark.slow
def test_measures_and_a_template_of_a_cell_trained_before(new_place):
    """One task of the laboratory's three gives no score; the others, later, complete it."""
    new_place.run("train", *SMALL[:4], "--template", "none")
    run_id = new_place.runs()[0].info.run_id
    options = ("--run-id", run_id, "--limit", "2")
    out, _ = new_place.run("evaluate", *options, "--tasks=toy_short", "--apply-template=true", "--output=found")
    assert "no score yet" in out
    assert "score" not in new_place.runs()[0].data.metrics
    (row,) = pd.read_csv(new_place.folder / "found/scores.csv").to_dict("records")
    assert (row["prompt"], row["harness_version"], row["task_type"]) == ("template none", "0.4.13", "short-generation")
    measures = ("--measures", "stability,weight_distance,length,memorisation,kl", "--measure-prompts", "4")
    new_place.run("evaluate", *options, "--tasks", "toy_choice,toy_long", *measures)
    run = new_place.runs()[0]
    mlflow.set_tracking_uri(new_place.uri)
    rows = mlflow.load_table("samples.json", run_ids=[run_id])
    assert list(rows["task"]) == ["toy_short"] * 2 + ["toy_choice"] * 2 + ["toy_long"] * 2
    assert run.data.metrics["score"] == pytest.approx(
        sum(run.data.metrics[name] for name in ("toy_short/acc", "toy_choice/acc", "toy_long/bleu")) / 3
    )
    losses = [point.value for point in new_place.client.get_metric_history(run_id, "train/loss")]
    expected = statistics.stdev(losses) / statistics.fmean(losses)
    assert run.data.metrics["measure/stability"] == pytest.approx(expected)
    assert run.data.metrics["measure/weight_distance"] > 0
    assert run.data.metrics["measure/kl"] > 0
    assert {
        "measure/length",
        "measure/memorisation",
        "measure/weight_distance_by_layer/layer_00",
    } <= run.data.metrics.keys()


def test_mlflow_run_joins_the_run_and_keeps_the_callers_spelling(new_place):
    def project(*parameters):
        command = ["mlflow", "run", str(ROOT / "local"), "--env-manager", "local"]
        for parameter in parameters:
            command += ["-P", parameter]
        return subprocess.run(
            command, cwd=new_place.folder, env=new_place.environment(), capture_output=True, text=True
        )

    small = ("max_records=120", "epochs=1", "limit=2", f"checkpoint_dir={new_place.folder}/checkpoints")
    done = project("plw=1e-2", *small)
    assert done.returncode == 0, done.stderr
    (run,) = new_place.runs()
    assert run.info.status == "FINISHED"
    assert run.data.params["plw"] == "1e-2"
    assert (run.data.params["seed"], run.data.tags["plw.preset.seed"]) == ("''", "1234")  # MLflow quotes nothing so
    assert "score" in run.data.metrics
    assert (
        json.loads(
            Path(
                mlflow.artifacts.download_artifacts(
                    run_id=run.info.run_id, artifact_path="config.json", tracking_uri=new_place.uri
                )
            ).read_text()
        )["plw"]
        == 0.01
    )

    refused = project("plw=0.1", "plv=0.2")
    assert refused.returncode != 0
    assert "error: No such option '--plv'" in refused.stderr
    assert new_place.runs()[0].info.status == "FAILED"


@pytest.mark.slow
def test_a_killed_training_goes_on_from_its_last_checkpoint(new_place):
    command = ("main", "--max-records", "600", "--epochs", "2", "--save-every", "3", "--limit", "2")
    process = new_place.start(*command)
    checkpoints = new_place.folder / "checkpoints"
    wait_until(lambda: list(checkpoints.glob("*/step-*")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (killed,) = new_place.runs()
    out, _ = new_place.run(*command)
    assert "went on from the checkpoint of step" in out
    run = new_place.runs()[0]
    assert run.info.status == "FINISHED"
    steps = [point.step for point in new_place.client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == list(range(1, len(steps) + 1))  # the killed run's curve and its own, none lost or doubled
    assert run.data.tags["plw.resumed_from"] == killed.info.run_id
    killed = new_place.client.get_run(killed.info.run_id)
    assert killed.data.tags["plw.superseded_by"] == run.info.run_id
    assert "plw.cell" not in killed.data.tags
    assert killed.info.status == "KILLED"
    assert not list(checkpoints.iterdir())


@pytest.mark.slow
def test_a_killed_evaluation_given_again_says_the_same(new_place):
    command = ("evaluate", "--model", "toy", "--tasks", "toy_choice,toy_short", "--limit", "40")
    new_place.run(*command)
    (whole,) = new_place.runs()
    process = new_place.start(*command)
    answers = new_place.folder / "checkpoints"
    wait_until(lambda: any(file.stat().st_size for file in answers.rglob("answers-*.jsonl")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (file,) = answers.rglob("answers-*.jsonl")
    assert file.read_bytes()
    new_place.run(*command)
    again = new_place.runs()[0]
    assert again.info.status == "FINISHED"
    assert again.data.metrics == whole.data.metrics
    assert not list(answers.rglob("answers-*.jsonl"))


def test_a_loss_that_is_not_finite_leaves_the_curve_up_to_it(new_place):
    options = ("--learning-rate", "30", "--max-grad-norm", "1e9", "--max-records", "600")
    _, err = new_place.run("train", *options, status=1)
    (run,) = new_place.runs()
    steps = [point.step for point in new_place.client.get_metric_history(run.info.run_id, "train/loss")]
    assert f"at step {len(steps) + 1};" in err.splitlines()[-1]


@pytest.mark.slow
def test_fine_tuning_brings_out_what_the_base_has_read(new_place):
    """The laboratory's promise, by a wide margin: standard errors are 0.045 for the first two and 0.02 for the last."""
    new_place.run("evaluate", "--model", "toy")
    new_place.run("main", "--dataset", "toy-long")
    tuned, base = (run.data.metrics for run in new_place.runs())
    assert tuned["toy_choice/acc"] > 0.25 + 0.2  # chance is 0.25
    assert tuned["toy_short/acc"] > base["toy_short/acc"] + 0.2
    assert tuned["toy_long/bleu"] > base["toy_long/bleu"] + 0.1


SPREADS = {
    "--processes": ["entrypoints.train", "--processes", "2"],  # by torchrun
    "accelerate launch": ["accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"],
}
SPREADS["accelerate launch"] += ["--mixed_precision=no", "--dynamo_backend=no", "-m", "entrypoints.train"]
SPREADS["accelerate launch"] += ["--parallel", "fsdp2"]


def curve(place):
    (run, *_) = place.runs()
    assert run.info.status == "FINISHED"
    return {
        name: [(point.step, point.value) for point in place.client.get_metric_history(run.info.run_id, name)]
        for name in ("train/loss", "eval/prompt_loss", "eval/completion_loss")
    }


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(new_place):
    """A run each, all from the first process."""
    small = ["--max-records", "80", "--epochs", "2"]
    new_place.run("train", *small)
    expected = curve(new_place)
    assert len(expected["train/loss"]) == 10
    for number, command in enumerate(SPREADS.values(), start=2):
        done = subprocess.run(
            [sys.executable, "-m", *command, *small],
            cwd=new_place.folder,
            env=new_place.environment(OMP_NUM_THREADS="1"),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("trained to step 10") == 1
        assert len(new_place.runs()) == number
        found = curve(new_place)
        for name, points in expected.items():
            assert [step for step, _ in found[name]] == [step for step, _ in points]
            assert [value for _, value in found[name]] == pytest.approx([value for _, value in points], rel=1e-5)


def test_an_interrupt_ends_the_run_as_killed(new_place):
    process = new_place.start("train", "--save-every", "1")
    wait_until(lambda: list((new_place.folder / "checkpoints").glob("*/step-*")), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130
    assert (
        err.strip().splitlines()[-1]
        == "error: interrupted; the same command goes on from the last checkpoint of a model it was training, if any"
    )
    assert new_place.runs()[0].info.status == "KILLED"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("train", "--max-tokens", "20"), 2, "no example of toy-short is left to train on"),
        (("train", "--max-tokens", "4096"), 2, "max-tokens is 4096, but toy has 512 positions"),
        (("train", "--learning-rate", "1e30", "--max-records", "120"), 1, "at step"),
    ],
)
def test_bad_input_is_one_line_and_a_failed_run(new_place, arguments, status, message):
    """What a look at names and folders tells is said before, without a run: test_checks.py."""
    _, err = new_place.run(*arguments, status=status)
    (line,) = (line for line in err.splitlines() if line.startswith("error:"))
    assert message in line
    assert "Traceback" not in err
    (run,) = new_place.runs()
    assert run.info.status == "FAILED"
    assert message in run.data.tags["plw.error"]
    assert not new_place.client.search_registered_models()


def test_an_unreachable_tracking_server_is_one_line(new_place):
    started = time.monotonic()
    _, err = new_place.run("prepare", status=1, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert err.strip().splitlines()[-1].startswith("error: the tracking store http://127.0.0.1:9 cannot be used")
    assert "Traceback" not in err
    assert time.monotonic() - started < 120  # MLflow alone would retry for minutes; this bounds a hang, not a speed


def test_sweep_is_a_parent_with_a_child_per_cell_and_an_analysis(new_place):
    out, _ = new_place.run("sweep", "--plw", "0,0.1,1", "--dataset", "toy-short", *SMALL, "--output", "sweep")
    parent = next(run for run in new_place.runs() if "mlflow.parentRunId" not in run.data.tags)
    children = [run for run in new_place.runs() if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(run.data.params["plw"] for run in children) == ["0.0", "0.1", "1.0"]
    assert {run.info.status for run in children} == {"FINISHED"}
    assert len({run.data.tags["plw.cell"] for run in children}) == 3
    fit = json.loads((new_place.folder / "sweep" / "fit.json").read_text())
    (answer,) = fit["answers"]
    assert answer["dataset"] == "toy-short"
    assert "3 of 3 cells finished" in out
    assert "the alias best of plw-toy-toy-short stays where it is, as the score of run" in out  # of 4 questions a task
    assert "best" not in new_place.client.get_registered_model("plw-toy-toy-short").aliases

    mlflow.set_tracking_uri(new_place.uri)
    regression = mlflow.pyfunc.load_model("models:/plw-regression/1")
    predicted = regression.predict(pd.DataFrame({"dataset": ["toy-short"], "plw": [0.0]}))
    (lead,) = (one for one in fit["fits"] if one["model"] == answer["lead"])
    assert predicted["score"][0] == pytest.approx(lead["coefficients"]["intercept"])  # w_p is 0 at PLW 0

    out, _ = new_place.run("analyze", "--run-id", parent.info.run_id, "--against", "0", "--output", "again")
    again = json.loads((new_place.folder / "again" / "fit.json").read_text())
    assert again["fits"] == fit["fits"]
    assert "PLWs less PLW 0, question by question" in out
    compared = pd.read_csv(new_place.folder / "again" / "against.csv")
    assert list(compared["plw"].unique()) == [0.1, 1.0]
    assert set(compared["questions"]) == {4, 12}
    assert "Question by question against PLW 0" in (new_place.folder / "again" / "report.html").read_text()
    beside = questions.compare(questions.read_beside(new_place.folder / "sweep" / "scores.csv"), 0.0)
    assert list(questions.frame(beside)["p"]) == pytest.approx(list(compared["p"]))


@pytest.mark.slow
def test_a_terminated_sweep_has_its_cell_save_and_end(new_place):
    process = new_place.start("sweep", "--plw", "0,1", "--dataset", "toy-short", "--save-every", "5")
    folder = new_place.folder / "checkpoints"
    wait_until(lambda: list(folder.glob("*/step-*")), process)
    process.terminate()  # alone, as Docker does it to the first process of a container
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].startswith("error: interrupted")
    assert [run.info.status for run in new_place.runs()] == ["KILLED", "KILLED"]  # the first cell and the sweep
    with checkpoints.reserve(next(folder.iterdir())):  # no process holds it any more
        pass


@pytest.mark.slow
def test_a_sweep_names_a_data_set_that_cannot_be_used_before_the_first_cell(new_place):
    (new_place.folder / "broken.json").write_text("[{}]")
    _, err = new_place.run("sweep", "--plw", "0", "--dataset", "toy-short,broken.json", *SMALL, status=2)
    assert err.splitlines()[-1].startswith("error: plw 0 broken toy full seed 1234: broken.json has")
    assert new_place.runs() == []


def test_analyze_of_a_table_writes_its_files_and_a_registered_regression(new_place):
    out, _ = new_place.run("analyze", "--scores", ROOT / "paper/tables/v1_scores.csv", "--output", "study")
    names = {path.name for path in (new_place.folder / "study").iterdir() if path.name not in (LIST, LOCK)}
    assert {"fit.json", "report.html"} <= names
    assert "0.2434" in out
    (run,) = new_place.runs()
    logged = {item.path for item in new_place.client.list_artifacts(run.info.run_id)}
    assert names <= logged


def wait_until(holds, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
