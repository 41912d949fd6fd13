"""Verification: a recorded cell is run again from what MLflow holds of it, and everything is compared.

The cell is trained by the very code that `main` runs, into a store that is thrown away, so nothing that is recorded
changes, and MLflow's list of cells gets no new run. The record gives the options, the digest of the data, and the
digest or commit of the model. What they name is looked for on this machine.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from plw_mlflow import cell, tracking
from plw_mlflow.config import (
    DATA_FILE_ENDINGS,
    MODELS,
    DataOptions,
    ScoreOptions,
    TrainConfig,
    VerifyConfig,
    cache_folder,
    flag,
    recorded_data_options,
    spell,
)
from plw_mlflow.data import sources
from plw_mlflow.environment import outputs, provenance
from plw_mlflow.environment.provenance import CODE_OF_CELLS
from plw_mlflow.errors import RunError, UserError, did_you_mean, first_line
from plw_mlflow.evaluation import evaluate, held_out, prompting
from plw_mlflow.evaluation.scores import Evaluation
from plw_mlflow.evaluation.tasks import load_tasks
from plw_mlflow.tracking import Record

MACHINE = ("processor", "device", "devices", "threads", "processes")  # of the environment; the rest are versions
CONTENTS = {"examples": "examples_sha256", "base": "base_model", "tokenizer": "tokenizer_sha256"}  # and their tags
EFFECTS = ("loss", "weights", "scores", "logged")  # findings that follow from the others
COLUMNS = ("score", "stderr")  # of scores.csv
AXES = ("w_p", "prompt_share")  # metrics that analyses read beside scores
MOST_NAMED = 5  # in one line


@dataclass(frozen=True)
class Finding:
    """What one comparison has found."""

    what: str
    is_same: bool | None  # None where it could not be compared
    text: str
    is_fault: bool = True  # if it differs; else it is said, and does not fail the verification by itself

    def line(self) -> str:
        """The finding for a person."""
        word = {True: "same", False: "DIFFERS", None: "not compared"}[self.is_same]
        return f"{word:<13} {self.what:<10} {self.text}"


def run(config: VerifyConfig) -> None:
    """Verify a cell, print what was found, and say it on the cell's run.

    Raises RunError that names what differs, and UserError where the cell cannot be repeated here.
    """
    findings = []
    failed: UserError | None = None  # with what was found before, which may have taken hours
    with tracking.recorded(str(config.run_id)) as record:
        print(f"run {record.run.id}: {record.name}", flush=True)
        try:
            for finding in _compare(record, config):
                print(finding.line(), flush=True)
                findings.append(finding)
        except UserError as error:
            failed = error
            findings.append(Finding("the rest", None, str(error)))
    summary = summarise(findings)
    print(summary)
    scope = "scores alone" if config.scores else "digests alone" if config.data else "run again"
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    tracking.note_verification(str(config.run_id), f"{when}, {scope}: {summary}")
    if config.output is not None:
        content: dict[str, Any] = {"run_id": config.run_id, "when": when, "scope": scope, "summary": summary}
        content["findings"] = [asdict(finding) for finding in findings]
        outputs.write(config.output, {"verification.json": (json.dumps(content, indent=2) + "\n").encode()})
    if failed is not None:
        raise failed
    different = [finding.what for finding in findings if finding.is_same is False]
    if any(finding.is_fault for finding in findings if finding.is_same is False):
        raise RunError(f"{len(different)} of {len(findings)} comparisons differ: {', '.join(different)}")


def summarise(findings: Sequence[Finding]) -> str:
    """What differs and what that does, in a sentence."""
    different = [finding.what for finding in findings if finding.is_same is False]
    compared = [finding.what for finding in findings if finding.is_same is not None]
    effects = [what for what in EFFECTS if what in compared]
    changed = [what for what in effects if what in different]
    causes = [what for what in different if what not in EFFECTS]
    if not different:
        return f"all is as recorded, to the bit: {', '.join(compared)}"
    if not causes:
        return f"what differs is {', '.join(changed)}, and nothing that is compared explains why"
    kept = [what for what in effects if what not in changed]
    does = f"; this may be why {', '.join(changed)} differ{'s' * (len(changed) == 1)}" if changed else ""
    if changed and causes == ["machine"]:
        does += " (another machine may add numbers up in another order: look at how large the differences are)"
    stays = f"; it does not change {', '.join(kept)}" if kept else ""
    return f"what differs is {', '.join(causes)}{does}{stays}"


def _compare(record: Record, config: VerifyConfig) -> Iterator[Finding]:
    """All comparisons that are asked for, the quick ones first."""
    yield _code(record)
    if record.environment.get("device", "").startswith(("x86", "arm", "aarch")) and "threads" in record.environment:
        torch.set_num_threads(int(record.environment["threads"]))  # which decide in which order numbers are added up
    here = provenance.fingerprint()
    yield _environment("packages", record.environment, here, [name for name in here if name not in MACHINE])
    # That the machine is another one is no fault of the record.
    yield replace(_environment("machine", record.environment, here, MACHINE), is_fault=False)
    yield _logged_files(record)
    if config.scores:
        yield from _guarded("scores", lambda: _scores(record, record, config))
        return
    with tempfile.TemporaryDirectory() as scratch:
        again = _options_of_now(record, config, Path(scratch))
        yield _data(record, again)
        key, contents = cell.identify(again)
        named = [_digest(what, contents[what], record.tags.get(tag)) for what, tag in CONTENTS.items()]
        yield from named
        is_explained = contents["data"] != record.tags["data_sha256"] or any(one.is_same is False for one in named)
        yield _options(record, None if is_explained else key)
        if config.data:
            return
        for number in set(_latest(record).values()):  # what is not here is said before the training
            _scoring(record, record.evaluations[number], config)
        with tracking.scratch_run(again) as run:
            with redirect_stdout(StringIO()):  # which says where the run is that is thrown away
                cell.lead(again, run)
            with tracking.reading(run.id) as repeated:
                yield from _guarded("loss", lambda: [_curves(record, repeated)])
                yield from _guarded("weights", lambda: [_weights(record, repeated)])
                yield from _guarded("scores", lambda: _scores(record, repeated, config))
        yield from _not_repeated(record)


def _guarded(what: str, compare: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a comparison, or that it cannot be made: what lies in a store may be of any kind."""
    try:
        yield from compare()
    except Exception as error:
        yield Finding(what, False, f"cannot be compared: {first_line(error)}")


def _not_repeated(record: Record) -> Iterator[Finding]:
    """What the record holds that a verification does not repeat."""
    if measures := [name for name in record.metrics if name.startswith("measure/")]:
        yield Finding("measures", None, f"{', '.join(measures)}: measures are not repeated")
    if (processes := record.environment.get("processes", "1")) != "1":
        yield Finding("processes", None, f"the cell was trained by {processes}, and is repeated by one")


def _code(record: Record) -> Finding:
    here, there = provenance.code_files(provenance.ROOT), record.code
    commits = f"commit {provenance.commit() or 'unknown'}, recorded {record.tags.get('git_commit', 'unknown')}"
    if not there:  # of an older run, which has the digest of all files alone
        return _digest("code", provenance.code_digest(provenance.ROOT), record.tags.get("code_sha256"), commits)
    changed = [
        f"{name} {'is new' if name not in there else 'is gone' if name not in here else 'has changed'}"
        for name in sorted(here.keys() | there.keys(), key=lambda name: (not name.startswith(CODE_OF_CELLS), name))
        if here.get(name) != there.get(name)
    ]
    is_of_cells = any(name.startswith(CODE_OF_CELLS) for name in changed)
    text = _listed(changed) or f"{len(here)} files"
    none_of_cells = "; none of them decides what a cell's model and scores are" * (bool(changed) and not is_of_cells)
    return Finding("code", not changed, f"{text}{none_of_cells} ({commits})", is_fault=is_of_cells)


def _environment(what: str, there: Mapping[str, str], here: Mapping[str, str], names: Iterable[str]) -> Finding:
    known = [name for name in names if name in there]
    different = [f"{name} {here.get(name)}, recorded {there[name]}" for name in known if there[name] != here.get(name)]
    if not known:
        return Finding(what, None, "the run does not say it")
    return Finding(what, not different, _listed(different) or ", ".join(f"{name} {here[name]}" for name in known))


def _logged_files(record: Record) -> Finding:
    """Whether the files of the logged model are those that were logged."""
    if record.model is None:
        is_meant = "log-model none" in record.why_no_model
        return Finding("model", None if is_meant else False, record.why_no_model)
    return _digest("model", tracking.files_digest(record.model), record.tags.get("model_sha256"))


def _digest(what: str, here: str, there: str | None, more: str = "") -> Finding:
    more = f" ({more})" if more else ""
    if there is None:
        return Finding(what, None, f"the run does not say its digest{more}")
    shown = f"has the digest {_short(here)}"
    return Finding(what, here == there, f"{shown}{'' if here == there else f', recorded {_short(there)}'}{more}")


def _short(digest: str) -> str:
    """A digest that can still be told from others; a hub id with its commit stays whole."""
    return digest if "@" in digest else digest[:16]


def _listed(names: Sequence[str]) -> str:
    more = f"; and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return "; ".join(names[:MOST_NAMED]) + more


# The options, and what they name.


def _options_of_now(record: Record, config: VerifyConfig, scratch: Path) -> TrainConfig:
    """The options by which the cell was trained, with the places of data and model on this machine.

    Raises UserError where data or model are not here, or where this version does not know the values.
    """
    hints = typing.get_type_hints(TrainConfig)
    given = {name: value for name, value in record.options.items() if name in hints and value is not None}
    given |= {"output": None, "checkpoint_dir": scratch / "checkpoints", "store_checkpoints": False, "processes": 1}
    given |= {"cache_dir": config.cache_dir, "data_dir": _data_dir(record, config)}
    given |= {"model": _base(record, config), "precision": record.tags.get("precision", given["precision"])}
    # With the precision that was used, auto saves as it did then: a whole model in that, an adapter in float32.
    if given.get("log_model") == "none":  # then it was scored as it was trained, without rounding
        given |= {"log_model": "auto", "save_precision": "float32"}
    recorded = {source["name"]: source for source in record.sources}
    for name in ("dataset", "mix"):
        if given.get(name):
            given[name] = _place_of_data(recorded.get(given[name], {"name": given[name]}), given["data_dir"], scratch)
    return TrainConfig(**given)


def _data_dir(record: Record, config: VerifyConfig) -> Path | None:
    before = record.options.get("data_dir")
    if config.data_dir is not None:
        return config.data_dir
    return Path(before) if before and Path(before).is_dir() else None


def _base(record: Record, config: VerifyConfig) -> str:
    """The name of the base model here: by commit on the hub, or a folder, whose digest is compared later."""
    name, content = str(record.options["model"]), record.tags.get("base_model", "")
    if name == "toy" or name in MODELS:
        return name
    if "@" in content:
        return content
    place = config.base or name
    if not Path(place).is_dir():
        raise UserError(f"the base model {place} is not here; name the folder that holds it: --base")
    return place


def _place_of_data(source: Mapping[str, Any], data_dir: Path | None, scratch: Path) -> str:
    """What a recorded data set is called here: a file of its content is looked for, a hub's is taken by its commit.

    A file of the recorded name with other content is better than none: the difference is named, and its effect seen.
    """
    name, location = str(source["name"]), str(source.get("location", ""))
    if location.startswith("hf://datasets/"):
        return location.removeprefix("hf://datasets/")
    if name in (*sources.TOY, *sources.NAMED):
        return name
    beside = [data_dir / Path(name).name, *sorted(data_dir.iterdir())] if data_dir else []
    files = [path for path in (*beside, Path(name), Path(location)) if path.is_file()]
    for file in files:
        if _sha256(file) == source.get("sha256"):
            if file.name == Path(name).name:
                return str(file)
            link = scratch / Path(name).name  # as the ids of records begin with the file's name
            link.symlink_to(file.resolve())
            return str(link)
    same_name = [file for file in files if file.name == Path(name).name]
    if not same_name:
        raise UserError(
            f"the data set {name} is not here{did_you_mean(name, folders=[data_dir] if data_dir else [])}; name the "
            "folder that holds it: --data-dir"
        )
    return str(same_name[0])


def _sha256(file: Path) -> str:
    """What identifies the content of a data file; empty for other files."""
    if not file.name.lower().endswith(DATA_FILE_ENDINGS):
        return ""
    try:
        return sources.find(str(file), Path()).sha256
    except UserError:  # no data set
        return ""


def _data(record: Record, again: TrainConfig) -> Finding:
    cache = cache_folder(again)
    found = [sources.find(name, cache, again.data_dir) for name in (again.dataset, again.mix) if name]
    there = record.tags["data_sha256"].split(",")
    names = [source["name"] for source in record.sources] or [source.name for source in found]
    parts, is_same = [], len(there) == len(found)
    for name, source, sha256 in zip(names, found, there, strict=False):
        differs = "" if source.sha256 == sha256 else f", recorded {_short(sha256)}"
        parts.append(f"{name} has the SHA-256 {_short(source.sha256)}{differs}")
        is_same &= not differs
    return Finding("data", is_same, "; ".join(parts))


def _options(record: Record, key: str | None) -> Finding:
    """Whether config.json, the parameters and the digest that identifies the cell agree.

    key: that of config.json; None where it cannot agree because something else differs.
    """
    hints = typing.get_type_hints(TrainConfig)
    different = [
        f"{flag(name)} is {_value(option)} in config.json, and {given} as a parameter"
        for name, option in record.options.items()
        if name in hints and (given := record.parameters.get(name)) is not None and not given.startswith("sha256:")
        if name != "template" and tracking.by_value(spell(option), hints[name]) != tracking.by_value(given, hints[name])
    ]
    unknown = [f"{flag(name)} is unknown to this version" for name in record.options if name not in _known_options()]
    there = record.tags["cell"]
    if key is not None and key != there:
        different.append(f"those of config.json give the cell the key {key}, and it was trained as {there}")
    elif different and key is not None:
        different.append("the cell's key agrees with config.json")
    found = _listed([*different, *unknown])
    agree = "config.json and the parameters agree"
    as_key = f"they are those that the cell's key {there} is of" if key is not None else f"{agree}; the key is another"
    return Finding("options", not different, found or as_key)


def _value(option: Any) -> str:
    return spell(option) or "unset"


def _known_options() -> set[str]:
    return {field.name for part in (TrainConfig, ScoreOptions) for field in fields(part)}


# What came out.


def _curves(record: Record, repeated: Record) -> Finding:
    texts, lengths = [], set()
    for name, there in record.curves.items():
        here = repeated.curves.get(name, {})
        lengths.add(max(there))
        if here == there:
            continue
        if here.keys() != there.keys():
            texts.append(f"{name} has {len(here)} values, recorded {len(there)}")
            continue
        steps = [step for step in there if here[step] != there[step]]
        worst = max(steps, key=lambda step: abs(here[step] - there[step]))
        texts.append(
            f"{name} from step {steps[0]} on, by at most {abs(here[worst] - there[worst]):.2g} (step {worst}), at the "
            f"end {here[max(here)]:.6g}, recorded {there[max(there)]:.6g}"
        )
    if not record.curves:
        return Finding("loss", None, "the run has no curves")
    return Finding("loss", not texts, _listed(texts) or f"{len(record.curves)} curves over {max(lengths)} steps")


def _weights(record: Record, repeated: Record) -> Finding:
    if record.model is None or repeated.model is None:
        return Finding("weights", None, record.why_no_model or repeated.why_no_model)
    there, here = _places(record.model), _places(repeated.model)
    if odd := sorted(there.keys() ^ here.keys()):
        return Finding("weights", False, f"not both have {_listed(odd)}")
    different: dict[str, float] = {}
    count = 0
    for name in there:
        one, other = _read(there[name], name), _read(here[name], name)
        count += one.numel()
        if one.shape != other.shape or one.dtype != other.dtype:
            return Finding(
                "weights", False, f"{name} is {list(other.shape)} {other.dtype}, not {one.dtype} as recorded"
            )
        if not torch.equal(_bits(one), _bits(other)):
            different[name] = float((one.double() - other.double()).abs().max())
    if different:
        worst = max(different, key=different.__getitem__)
        where = f"{len(different)} of {len(there)} tensors, by at most {different[worst]:.2g} ({worst})"
        return Finding("weights", False, where)
    return Finding("weights", True, f"{count:,} numbers in {len(there)} tensors")


def _places(model: Path) -> dict[str, Path]:
    """The file of each tensor of a logged model, whole or an adapter."""
    found: dict[str, Path] = {}
    for file in sorted(file for part in ("model", "peft") for file in (model / part).glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as content:
                found |= dict.fromkeys(content.keys(), file)
        except Exception as error:  # of whatever lies there
            raise UserError(f"{file} cannot be read: {error}") from None
    return found


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as content:
        return content.get_tensor(name)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def _scores(record: Record, source: Record, config: VerifyConfig) -> Iterator[Finding]:
    """The findings of benchmarks, scores, and what is logged of these: each evaluation of the cell is repeated.

    source: of the model that is scored.
    """
    latest = _latest(record)
    numbers = sorted(set(latest.values()))
    if not numbers:
        reason = "is older than this comparison" if record.evaluations else "was not scored"
        yield Finding("scores", None, f"the cell {reason}")
        return
    benchmarks, texts, count = [], [], 0
    found_again = Evaluation([], {})
    for number in numbers:
        there = record.evaluations[number]
        again = _score_again(record, source, there, config)
        here = again.results
        found_again.scores.extend(score for score in again.scores if latest.get(score.task) == number)
        found_again.questions.extend(row for row in again.questions if latest.get(row["task"]) == number)
        for task in (task for task, its in latest.items() if its == number):
            if here["benchmarks"].get(task) != there["benchmarks"][task]:
                benchmarks.append(f"{task} has other documents than recorded")
            for name, value in _numbers(there, task).items():
                found = _numbers(here, task).get(name)
                count += 1
                if found != value:
                    texts.append(f"{task} {name} {_shown(found)}, recorded {_shown(value)}")
    yield Finding("benchmarks", not benchmarks, _listed(benchmarks) or ", ".join(latest))
    yield Finding("scores", not texts, _listed(texts) or f"{count} numbers of {len(latest)} tasks")
    yield from _guarded("logged", lambda: [_logged(record, source, found_again)])


def _latest(record: Record) -> dict[str, int]:
    """Of each task the number of its last evaluation, which is the one that counts."""
    latest: dict[str, int] = {}
    for number, results in enumerate(record.evaluations):
        latest |= dict.fromkeys(results.get("benchmarks", {}), number)
    return latest


def _logged(record: Record, source: Record, again: Evaluation) -> Finding:
    """Whether the numbers that people and analyses read are those found again: metrics, scores.csv, and questions.

    source: of the model that was scored.
    """
    expected: dict[str, float | None] = {}
    for score in again.scores:
        name = f"the metric {score.task}/{score.metric}"
        expected |= {name: score.score} | ({} if score.stderr is None else {f"{name}_stderr": score.stderr})
    of_score = {*record.tags.get("score_tasks", "").split(",")}
    counted = {score.key: score.score for score in again.scores if score.key in of_score}
    if counted.keys() == of_score:
        expected["the metric score"] = statistics.fmean(counted.values())
    expected |= {f"the metric {name}": source.metrics[name] for name in AXES if name in source.metrics}
    recorded: dict[str, float | None] = {f"the metric {name}": value for name, value in record.metrics.items()}
    for column in COLUMNS:
        in_csv = f"{column} in scores.csv of"
        expected |= {f"{in_csv} {one.task}/{one.metric}": getattr(one, column) for one in again.primary}
        recorded |= {
            f"{in_csv} {row['task']}/{row['metric']}": row[column]
            for row in tracking.read_scores(record.run).to_dict("records")
        }
    of_csv = {name for name in recorded if "in scores.csv of" in name}
    texts = [
        f"{name} {_shown(expected.get(name))}, recorded {_shown(recorded.get(name))}"
        for name in sorted(expected.keys() | of_csv)
        if not _is_same_number(expected.get(name), recorded.get(name))
    ]
    questions, told = _questions(record, again)
    said = f"{len(expected)} numbers of metrics and scores.csv, {told}"
    return Finding("logged", not [*texts, *questions], _listed([*texts, *questions]) or said)


def _questions(record: Record, again: Evaluation) -> tuple[list[str], str]:
    """In what the kept scores of questions differ, and what was compared."""
    kept = tracking.read_questions(record.run, ["metric", "doc_id", "document", "value", "prediction"])
    if kept.empty:
        return [], "no questions are kept"
    here = {(row["task"], row["metric"], row["doc_id"]): row for row in again.questions}
    there = {(row["task"], row["metric"], row["doc_id"]): row for row in kept.to_dict("records")}
    different = [
        key
        for key in here.keys() | there.keys()
        if key not in here
        or key not in there
        or not _is_same_number(here[key]["value"], there[key]["value"])
        or any(here[key][name] != there[key][name] for name in ("document", "prediction"))
    ]
    if not different:
        return [], f"{len(there)} of questions"
    task, metric, number = min(different)
    return [f"{len(different)} of {len(there)} questions' scores, such as {task} {metric} of document {number}"], ""


def _is_same_number(one: float | None, other: float | None) -> bool:
    """Whether two numbers are the same but for how a file spells them; none and NaN are one."""
    one, other = (None if value is None or math.isnan(value) else value for value in (one, other))
    return one is other if one is None or other is None else math.isclose(one, other, rel_tol=1e-12)


def _numbers(results: Mapping[str, Any], task: str) -> dict[str, float]:
    """The numbers of one task in the harness's results, standard errors included."""
    found = results["results"].get(task, {})
    return {name: value for name, value in found.items() if "," in name and isinstance(value, int | float)}


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"


@dataclass(frozen=True)
class _Scoring:
    """By what an evaluation is repeated, all of which is here."""

    options: ScoreOptions
    data: DataOptions  # of held-out sets
    held_out: tuple[Mapping[str, Any], ...]  # these sets as they were recorded


def _scoring(record: Record, there: Mapping[str, Any], config: VerifyConfig) -> _Scoring:
    """By what an evaluation is repeated. there: its results. Raises UserError where benchmarks or data are not here."""
    given = {name: there["scoring"].get(name) for name in evaluate.SCORED_BY}  # older records lack some
    # Benchmarks that were the hub's do not become files because the training data are found in a folder.
    options = ScoreOptions(**given, data_dir=_data_dir(record, config) if there["documents_sha256"] else None)
    load_tasks(options)
    data = replace(recorded_data_options(record.options, _data_dir(record, config)), cache_dir=config.cache_dir)
    with tempfile.TemporaryDirectory() as scratch:
        for each in there.get("held_out", []):
            _place_of_data(each, data.data_dir, Path(scratch))
    return _Scoring(options, data, tuple(there.get("held_out", [])))


def _score_again(record: Record, source: Record, there: Mapping[str, Any], config: VerifyConfig) -> Evaluation:
    """An evaluation that is repeated with its options. there: its results."""
    scoring = _scoring(record, there, config)
    tasks = load_tasks(scoring.options)
    precision = there["scoring"]["precision"]
    held_in = torch.bfloat16 if precision == "bfloat16" else None
    is_adapter = source.model is not None and (source.model / "peft").is_dir()
    model, tokenizer = tracking.load_model(source.run, config.base if is_adapter else None, held_in)
    wrapping = None
    if scoring.options.apply_template:
        border = record.options.get("prompt_border", "offsets")
        wrapping = prompting.wrapping(record.options["template"], tokenizer, border)
    with tempfile.TemporaryDirectory() as scratch:
        names = [_place_of_data(each, scoring.data.data_dir, Path(scratch)) for each in scoring.held_out]
        sets = held_out.read(names, tokenizer, scoring.data, scoring.options.limit)
    seed = scoring.options.fewshot_seed
    return evaluate.run(model, tokenizer, tasks, scoring.options, seed, None, wrapping, precision, sets)
