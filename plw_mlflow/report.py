"""The report: one HTML file that answers whether PLW matters here, and every file an analysis leaves.

Jinja2 escapes whatever comes from the data; figures are embedded, so the file can be mailed or logged as it is.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from plw_mlflow.analyze import TERMS, Fit, check, missing_scores, rescale, to_json

MISSING_SHOWN = 100  # rows; fit.json has them all

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Does the prompt loss weight matter?</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1d1d1f; max-width: 66rem; margin: 2rem auto; padding: 0 1.5rem }
h1 { font-size: 1.9rem; line-height: 1.2; margin-bottom: .3rem } h2 { font-size: 1.3rem; margin-top: 2.4rem }
p { max-width: 52rem; margin: .6rem 0 }
.lead { color: #55555a } .answer { border-left: 5px solid #9a9a9a; padding: .3rem 0 .3rem 1rem; margin: .8rem 0 }
.answer.matters { border-color: #B22222 } .note { color: #7a4b00 } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .8rem 0 }
th, td { padding: .35rem .75rem; text-align: right; border-bottom: 1px solid #e2e2e6; white-space: nowrap }
th { border-bottom: 2px solid #1b3a5c; vertical-align: bottom } .text { text-align: left } .wrap { white-space: normal }
img { width: 100%; height: auto; margin-top: 1rem }
code, pre { background: #f4f4f6; border-radius: 4px; font-size: .85rem }
code { padding: .1rem .3rem; overflow-wrap: anywhere } pre { padding: .8rem; white-space: pre-wrap }
</style></head><body>
<h1>Does the prompt loss weight matter?</h1>
<p class="lead">Fine-tuning can weight the loss of prompt tokens anywhere between 0 (prompt masked) and 1 (trained
as the completion is). {{ rows }} scores on {{ tasks|length }} tasks say what this prompt loss weight (PLW) does to
{{ fits|map(attribute="dataset")|unique|join(", ") }}.</p>

<h2>The answer</h2>
{% for fit in fits %}
<div class="answer {{ 'matters' if fit.joint_p < 0.05 }}"><strong>{{ fit.dataset }}</strong><br>{{ fit.verdict }}</div>
{% endfor %}
<div class="scroll"><table>
<tr><th class="text">data set<th class="text">model<th>scores<th>tasks<th>joint p<th>optimum PLW<th>95 % interval</tr>
{% for fit in fits %}
<tr><td class="text">{{ fit.dataset }}<td class="text">{{ fit.model }}<td>{{ fit.n }}<td>{{ fit.tasks }}
<td>{{ "%.2g"|format(fit.joint_p) }}
{% if fit.optimum_plw is none %}<td colspan="2">no interior optimum
{% else %}<td>{{ "%.4f"|format(fit.optimum_plw) }}
<td>{{ "%.3g"|format(fit.optimum_interval[0]) }} to {{ "%.3g"|format(fit.optimum_interval[1]) }}
{% endif %}</tr>
{% endfor %}
</table></div>
<p><strong>What the p-values mean.</strong> The joint p is the chance of a likelihood ratio at least as large as the one
seen if PLW had no effect at all (χ², 2 degrees of freedom, fitted by ML). It is not corrected for looking at
{{ fits|length }} data set{{ "s" if fits|length > 1 }}. The model lets tasks differ in level but not in how PLW moves
them, and takes scores as independent although one checkpoint is scored on every task; where either fails, p-values can
be too small and intervals too narrow. A large p says that these scores show no effect, not that there is none; and an
effect in one data set but not in another is no test of their difference.</p>

<h2>The curves</h2>
<p>Every task is centred on its own mean, since tasks differ far more than PLW moves any of them. Small marks are
scores, thin lines a task's mean over its runs, black dots the mean over tasks; the band is the curve's, pointwise.</p>
{% for fit, figure in figures %}
<img src="data:image/png;base64,{{ figure }}" alt="Scores of {{ fit.dataset }} against PLW. {{ fit.verdict }}">
{% for note in fit.notes %}<p class="note">{{ fit.dataset }}: {{ note }}</p>{% endfor %}
{% endfor %}

<h2>The fits</h2>
<p>Per data set, the linear mixed model <code>score ~ w_p + w_p^2 + (1 | task)</code> by REML, with
w_p = PLW<sup>{{ exponent }}</sup>. Standard errors in parentheses, p-values by t; unrounded in <code>fit.json</code>.
{% if scale == "fraction" %}The scores of tasks that exceed 1 were divided by 100.{% endif %}</p>
<div class="scroll"><table>
<tr><th class="text">data set<th>intercept<th>w_p<th>p<th>w_p²<th>p<th>variance,<br>tasks<th>variance,<br>residual
<th>REML log-<br>likelihood</tr>
{% for fit in fits %}
<tr><td class="text">{{ fit.dataset }}
{% for term in terms -%}
<td>{{ "%.4g"|format(fit.coefficients[term]) }} ({{ "%.2g"|format(fit.standard_errors[term]) }})
{%- if term in fit.p_values %}<td>{{ "%.2g"|format(fit.p_values[term]) }}{% endif %}
{% endfor -%}
<td>{{ "%.3g"|format(fit.var_task) }}<td>{{ "%.3g"|format(fit.var_residual) }}<td>{{ "%.2f"|format(fit.loglik) }}</tr>
{% endfor %}
</table></div>

<h2>The account of cells</h2>
<p>Models: {{ models|join(", ") }}. Seeds: {{ seeds|join(", ") }}. Tasks: {{ tasks|join(", ") }}. With {{ datasets }}
data set{{ "s" if datasets > 1 }} and {{ plws }} PLWs a full grid has {{ rows + missing_total }} scores;
<strong>{{ missing_total or "none" }} of them {{ "is" if missing_total == 1 else "are" }} missing.</strong></p>
{% if missing %}
<div class="scroll"><table>
<tr><th class="text">model<th class="text">data set<th>PLW<th>seed<th class="text">missing tasks</tr>
{% for cell, names in missing[:shown] %}
<tr><td class="text">{{ cell[0] }}<td class="text">{{ cell[1] }}<td>{{ "%g"|format(cell[2]) }}<td>{{ cell[3] }}
<td class="text wrap">{{ "the whole cell" if names|length == tasks|length else names|join(", ") }}</tr>
{% endfor %}
</table></div>
{% if missing|length > shown %}
<p>And {{ missing|length - shown }} cells more, listed in <code>fit.json</code>.</p>
{% endif %}
{% endif %}

<h2>How to reproduce</h2>
<pre>{{ command }}</pre>
<p>{% if table.source %}Scores: <code>{{ table.source }}</code>. {% endif %}
{% if table.file_sha256 %}The file's SHA-256: <code>{{ table.file_sha256 }}</code>. {% endif %}
SHA-256 of the sorted scores, whatever their file: <code>{{ table.sha256 }}</code>.</p>
</body></html>
"""


def html(fits: list[Fit], table: pd.DataFrame, figures: list[bytes], command: str) -> str:
    """The report of the fits of a table; `figures` has one PNG per fit, `command` says how to make it again."""
    cells = missing_scores(table).groupby(["model", "dataset", "plw", "seed"])["task"]
    missing = [(cell, list(tasks)) for cell, tasks in cells]
    described = to_json(fits, table)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE).render(
        fits=fits,
        terms=TERMS,
        exponent=described["exponent"],
        table=described["table"],
        scale=fits[0].scale,
        figures=[(fit, base64.b64encode(png).decode()) for fit, png in zip(fits, figures, strict=True)],
        rows=len(table),
        models=sorted(table["model"].unique()),
        datasets=table["dataset"].nunique(),
        plws=table["plw"].nunique(),
        seeds=sorted(table["seed"].unique()),
        tasks=sorted(table["task"].unique()),
        missing=missing,
        missing_total=sum(len(tasks) for _, tasks in missing),
        shown=MISSING_SHOWN,
        command=command,
    )


def write(fits: list[Fit], table: pd.DataFrame, directory: Path, command: str | None = None) -> list[Path]:
    """Write `fit.json`, `report.html` and a PNG per fit into a directory, and return their paths.

    `table` is the one the fits came from. Everything is made before anything is written, and each file is put in
    place whole, so an error leaves the directory as it was.
    """
    from plw_mlflow import figures  # matplotlib takes a second to import

    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; --output takes a directory")
    scores = shlex.quote(table.attrs.get("source", "FILE.csv"))
    scale = "" if fits[0].scale == "none" else f" --scale {fits[0].scale}"
    command = command or f"python -m entrypoints.analyze --scores {scores}{scale} --output DIR"
    table = check(table)
    scaled = rescale(table, fits[0].scale)
    pngs = [figures.draw_curve(fit, scaled[scaled["dataset"] == fit.dataset]) for fit in fits]
    fit_json: dict[str, Any] = to_json(fits, table)
    names: list[str] = []
    for fit, entry in zip(fits, fit_json["fits"], strict=True):
        name = f"{fit.model}-{re.sub(r'[^A-Za-z0-9.-]+', '-', fit.dataset).strip('-.')[:80] or 'dataset'}"
        name = name if name not in names else f"{name}-{len(names)}"  # two names may differ in signs only
        names.append(name)
        entry["figure"] = f"{name}.png"
    contents = {f"{name}.png": png for name, png in zip(names, pngs, strict=True)}
    contents["fit.json"] = (json.dumps(fit_json, indent=2, allow_nan=False) + "\n").encode()
    contents["report.html"] = html(fits, table, pngs, command).encode()

    directory.mkdir(parents=True, exist_ok=True)
    for filename, content in contents.items():
        partial = directory / f".{filename}.partial"
        partial.write_bytes(content)
        os.replace(partial, directory / filename)
    return [directory / filename for filename in contents]
