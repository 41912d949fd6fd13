"""Command lines: one flag a field of the entry point's config, and errors a person can read.

An empty value means "unset": MLproject has no other way to say so (a null default would make it mandatory).
"""

from __future__ import annotations

import ast
import errno
import inspect
import logging
import os
import signal
import sys
import textwrap
import traceback
import types
import typing
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any, Literal, NoReturn

import click

from plw_mlflow.command_line import checks
from plw_mlflow.config import UNSET, spell
from plw_mlflow.environment.processes import is_first_process, reports_interrupts
from plw_mlflow.environment.provenance import ROOT
from plw_mlflow.errors import ExpectedError, PrintableStream, first_line, not_installed, printable, without_passwords

# What a machine refuses; of other errors of the system, the traceback tells more.
REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG}
INTERRUPTED = "interrupted; the same command goes on from the last checkpoint of a model it was training, if any"


def command(config_type: type[Any]) -> Callable[[Callable[[Any], None]], Callable[[], NoReturn]]:
    """Turn `main(config)` into a command with one option per field of `config_type`.

    Exit status: 0 done; 2 the caller's mistake, one line on standard error; 130 interrupted; 1 anything else.
    """

    def decorate(main: Callable[[Any], None]) -> Callable[[], NoReturn]:
        @click.command(
            cls=_Command,
            help=f"{config_type.__doc__}",
            context_settings={"show_default": True, "max_content_width": 120},
        )
        def parsed(**values: Any) -> None:
            config = config_type(**values)
            checks.check(config)
            with checks.reserved_output(config):
                main(config)

        for option in options(config_type):
            parsed = option(parsed)
        return lambda: _run(parsed)

    return decorate


def spread(processes: int) -> None:
    """Run this very command in so many processes by torchrun instead, unless it runs in several already."""
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        module = sys.modules["__main__"].__spec__  # None where the command was run as a file, not by python -m
        name = f"entrypoints.{Path(sys.argv[0]).stem}" if module is None else module.name
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        torchrun.append("--shutdown-timeout=3600")  # its own 30 s are less than a large checkpoint takes after SIGTERM
        sys.stdout.flush()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        os.execve(sys.executable, [*torchrun, "-m", name, *sys.argv[1:]], os.environ | {"PYTHONPATH": path})


def options(config_type: type[Any]) -> list[Callable[[Any], Any]]:
    """A click option for each field of a config."""
    help_lines = _help(config_type)
    hints = typing.get_type_hints(config_type)
    return [
        click.option(
            "--" + field.name.replace("_", "-"),
            field.name,
            type=_FieldType(hints[field.name], is_optional=field.default is None),
            default=None if field.default is None else spell(field.default),
            help=help_lines[field.name],
            **_alone(hints[field.name]),
        )
        for field in fields(config_type)
    ]


def _alone(hint: Any) -> dict[str, Any]:
    """What makes --invert alone mean --invert true."""
    return {"is_flag": False, "flag_value": "true"} if hint is bool else {}


class _Command(click.Command):
    """A command that refuses an option given twice, of which click would use the last value and say nothing.

    It refuses `--invert=--plw=0.9`, too, of which click would make two options.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for option in self.params:
            for word in args if getattr(option, "flag_value", None) == "true" else []:
                name, _, value = word.partition("=")
                if name in option.opts and value.startswith("-"):
                    raise click.BadParameter(f"{value!r} is not a valid boolean.", ctx, option)
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for option, times in Counter(given).items():
            if times > 1 and isinstance(option, click.Option) and not option.is_eager:
                flag = option.opts[0]
                if "comma-separated" in (option.help or ""):
                    way_out = f"give it once, with its values separated by commas: {flag} A,B"
                else:
                    way_out = "it has one value; give it once"
                raise click.UsageError(f"{flag} is given {times} times; {way_out}", ctx)
        return super().parse_args(ctx, args)


class _FieldType(click.ParamType):
    """A field's type as click wants it; where the field has no default, or a preset's, an empty value is unset."""

    def __init__(self, hint: Any, *, is_optional: bool) -> None:
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        (kind,) = [part for part in parts if part is not type(None)]
        self.is_optional = is_optional
        if typing.get_origin(kind) is Literal:
            self.inner: click.ParamType = click.Choice(list(typing.get_args(kind)))
        else:
            self.inner = {
                bool: click.BOOL,
                int: click.INT,
                float: click.FLOAT,
                Path: click.Path(path_type=Path),
            }.get(kind, click.STRING)
        self.name = self.inner.name

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        return self.inner.get_metavar(param, ctx)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in UNSET:
            if self.is_optional:
                return None
            self.fail("a value is needed", param, ctx)
        try:
            return self.inner.convert(value, param, ctx)
        except (ValueError, OSError) as error:  # half a surrogate pair, a NUL, or a name that is too long
            self.fail(f"{value!r} is not a valid {self.name}: {first_line(error)}", param, ctx)


def _help(config_type: type[Any]) -> dict[str, str]:
    """The string under each field, of the class and of those it inherits from."""
    found: dict[str, str] = {}
    for part in reversed(config_type.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = str(text.value.value)
    return found


def _run(parsed: click.Command) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's way to interrupt
    # Not in processes that a library forks: a pool ends its workers by SIGTERM, and one that is just about to wait for
    # a lock would take note of it too late.
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if not is_first_process():  # what the first says, it says for all of them; errors are each one's own
        sys.stdout = StringIO()
        warnings.simplefilter("ignore")
    else:
        sys.stdout = PrintableStream(sys.stdout)
    warnings.showwarning = lambda message, *_: print(f"warning: {_said(str(message))}", file=sys.stderr)
    sys.excepthook = lambda *error: _show_traceback(error[1])
    logging.setLogRecordFactory(_record)
    try:
        parsed.main(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _stop(error.format_message().replace("\n", " "), 2)
    except (KeyboardInterrupt, click.Abort):
        if reports_interrupts():
            _stop(INTERRUPTED, 130)
        sys.exit(130)
    except ExpectedError as error:
        _stop(" ".join(str(error).split()), error.status)
    except ModuleNotFoundError as error:
        _stop(not_installed(error), 2)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        _stop(": ".join(str(part) for part in (error.filename, error.strerror) if part is not None), 1)
    sys.exit(0)


def _stop(message: str, status: int) -> NoReturn:
    print(f"error: {_said(message)}", file=sys.stderr)
    sys.exit(status)


def _said(message: str) -> str:
    return printable(without_passwords(message))


def _show_traceback(error: BaseException) -> None:
    """What Python prints of an error that nobody caught, without the passwords that addresses may hold."""
    print(_said("".join(traceback.format_exception(error))), end="", file=sys.stderr)


def _record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    """What a library logs, without the passwords that addresses may hold."""
    record = logging.LogRecord(*args, **kwargs)
    try:
        text = record.getMessage()
    except Exception:  # a library's mistake, which logging itself would only note
        text = str(record.msg)
    record.msg, record.args = _said(text), ()
    if record.exc_info:
        record.exc_text = without_passwords(logging.Formatter().formatException(record.exc_info))
    return record
