"""Write the entry points of both MLproject files anew from the configs, after a change of options:  make mlproject"""

from dataclasses import fields
from pathlib import Path

from plw_mlflow.config import CONFIGS, spell

ROOT = Path(__file__).resolve().parents[1]
COMMAND_BEGINS = {"MLproject": "", "local/MLproject": "cd .. && "}
WIDTH = 112


def entry_points(begin: str) -> str:
    lines = ["entry_points:"]
    for name, config_type in CONFIGS.items():
        lines += [f"  {name}:", "    parameters:"]
        lines += [
            f'      {field.name}: {{type: string, default: "{spell(field.default)}"}}' for field in fields(config_type)
        ]
        lines += ["    command: >-", f"      {begin}python -m entrypoints.{name}"]
        part = "     "
        for field in fields(config_type):
            # In one word: a value that looks like an option must not become one.
            flag = f" --{field.name.replace('_', '-')}={{{field.name}}}"
            if len(part + flag) > WIDTH:
                lines.append(part)
                part = "     "
            part += flag
        lines.append(part)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for file, begin in COMMAND_BEGINS.items():
        head, _, _ = (ROOT / file).read_text().partition("entry_points:\n")
        (ROOT / file).write_text(head + entry_points(begin))
