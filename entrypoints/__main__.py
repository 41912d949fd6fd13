"""All commands as one: `plw train --plw 0.1` is what `python -m entrypoints.train --plw 0.1` is."""

import importlib.util
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the command that the first argument names, with the arguments that follow."""
    names = sorted(file.stem for file in Path(__file__).parent.glob("[!_]*.py"))
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in names:
        sys.argv = [f"plw {name}", *sys.argv[2:]]
        runpy.run_module(f"entrypoints.{name}", run_name="__main__", alter_sys=True)
    elif name in ("-h", "--help"):
        print("Usage: plw COMMAND [OPTIONS]\n\nCommands, each of which has --help:")
        print(*(f"  {name:<10}{_purpose(name)}" for name in names), sep="\n")
    else:
        print(f"error: there is no command {name!r}; the commands are {', '.join(names)}", file=sys.stderr)
        sys.exit(2)


def _purpose(name: str) -> str:
    """What a command does: the first words of its file."""
    spec = importlib.util.find_spec(f"entrypoints.{name}")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8").partition('"""')[2].partition(":  python")[0]


if __name__ == "__main__":
    main()
