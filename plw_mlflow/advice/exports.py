"""An advice as files: advice.json and advice.png."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plw_mlflow.advice.advise import Advice
from plw_mlflow.advice.wording import sentences
from plw_mlflow.environment import outputs
from plw_mlflow.transforms import EXPONENT

SCHEMA = "plw_mlflow.advice/1"
FILES = ("advice.json", "advice.png")


def to_json(advice: Advice) -> dict[str, Any]:
    """What `advice.json` holds; an infinite variance is null."""
    line = advice.line
    return {
        "schema": SCHEMA,
        "exponent": EXPONENT,
        "generation_ratio": advice.ratio,
        "dataset": advice.dataset,
        "task_types": list(advice.task_types),
        "suggested_plw": advice.plw,
        "interval": list(advice.interval),
        "mean_interval": list(advice.mean_interval),
        "is_located": advice.is_located,
        "sentences": sentences(advice),
        "own_share": advice.own_share,
        "line": None
        if line is None
        else {
            "intercept": float(line.pooled.coefficients[0]),
            "slope_per_tenfold": float(line.pooled.coefficients[1]),
            "covariance": line.pooled.covariance.tolist(),
            "degrees_of_freedom": line.pooled.degrees_of_freedom,
            "tau2_datasets": line.pooled.tau2,
            "tau2_models": line.tau2_models,
            "w_and_reach_by_share": list(line.by_share(advice.ratio)),
            "datasets": [asdict(dataset) for dataset in line.datasets],
        },
        "slopes": [asdict(slope) for slope in advice.slopes],
        "evidence": [
            asdict(point)
            | {"variance": point.variance if point.is_located else None}
            | {"best_plw": point.plw, "interval": list(point.interval)}
            for point in advice.points
        ],
        "single_runs": [asdict(runs) | {"gain": runs.gain, "reach": runs.reach} for runs in advice.single_runs],
    }


def write(advice: Advice, directory: Path) -> list[Path]:
    """Write `advice.json` and `advice.png` into a directory, and return their paths."""
    from plw_mlflow.advice.evidence_figure import draw  # matplotlib takes a while to import

    contents = [(json.dumps(to_json(advice), indent=2, allow_nan=False) + "\n").encode(), draw(advice)]
    return outputs.write(directory, dict(zip(FILES, contents, strict=True)))
