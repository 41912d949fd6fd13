"""The click options of a config: one flag a field, in groups, with the line under the field as help.

An empty value means "unset": MLproject has no other way to say so, as a null default would make a parameter mandatory.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
import typing
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import click

from plw_mlflow.config import LISTABLE, UNSET, Config, SweepConfig, flag, spell
from plw_mlflow.errors import first_line


class Command(click.Command):
    """A command that shows its options in groups, and refuses some input that click would take for something else."""

    def __init__(
        self, *args: Any, groups: dict[str, list[str]] | None = None, takes_lists: bool = False, **kwargs: Any
    ) -> None:
        """groups: the names of fields by heading, in the order in which the help shows them.

        takes_lists: whether the options of LISTABLE may list several values.
        """
        super().__init__(*args, **kwargs)
        self.groups, self.takes_lists = groups or {}, takes_lists

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = {option.name: option.get_help_record(ctx) for option in self.get_params(ctx)}
        others = [name for name in records if not any(name in names for names in self.groups.values())]  # --help
        for heading, names in self.groups.items():
            shown = names if heading != [*self.groups][-1] else [*names, *others]
            with formatter.section(heading):
                formatter.write_dl([record for name in shown if (record := records[name])])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse an option given twice, as click would use its last value alone; and --invert=--plw=0.9, as click
        would take that for two options.
        """
        for option in self.params:
            for word in args if getattr(option, "flag_value", None) == "true" else []:
                name, _, value = word.partition("=")
                if name in option.opts and value.startswith("-"):
                    raise click.BadParameter(f"{value!r} is not a valid boolean.", ctx, option)
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for option, times in Counter(given).items():
            if times > 1 and isinstance(option, click.Option) and not option.is_eager:
                name = option.opts[0]
                if "comma-separated" in (option.help or "") or (self.takes_lists and option.name in LISTABLE):
                    way_out = f"give it once, with its values separated by commas: {name} A,B"
                else:
                    way_out = "it has one value; give it once"
                raise click.UsageError(f"{name} is given {times} times; {way_out}", ctx)
        return super().parse_args(ctx, args)


class FieldType(click.ParamType):
    """A field's type as click wants it; where the field has no default, or a preset's, an empty value is unset."""

    def __init__(self, hint: Any, *, is_optional: bool) -> None:
        alternatives = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
        words = [word for kind in alternatives if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
        kinds = [kind for kind in alternatives if kind is not type(None) and typing.get_origin(kind) is not Literal]
        self.is_optional = is_optional
        by_kind = {bool: click.BOOL, int: click.INT, float: click.FLOAT, Path: click.Path(path_type=Path)}
        self.inner: click.ParamType = by_kind.get(kinds[0], click.STRING) if kinds else click.Choice(words)
        self.words = words if kinds else []  # what an option may be instead of a number
        self.name = self.inner.name

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        return "|".join([self.name.upper(), *self.words]) if self.words else self.inner.get_metavar(param, ctx)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in UNSET:
            if self.is_optional:
                return None
            self.fail("a value is needed", param, ctx)
        if value in self.words:
            return value
        try:
            return self.inner.convert(value, param, ctx)
        except (ValueError, OSError) as error:  # half a surrogate pair, a NUL, or a name that is too long
            self.fail(f"{value!r} is not a valid {self.name}: {first_line(error)}", param, ctx)


def options(config_type: type[Config]) -> list[Callable[[Any], Any]]:
    """A click option for each field of a config."""
    help_lines, hints = field_help(config_type), typing.get_type_hints(config_type)
    lists = LISTABLE if config_type is SweepConfig else ()  # texts, which the config itself reads
    alone_is_true: dict[str, Any] = {"is_flag": False, "flag_value": "true"}  # --invert means --invert true
    return [
        click.option(
            "--" + flag(field.name),
            field.name,
            type=FieldType(str if field.name in lists else hints[field.name], is_optional=field.default is None),
            default=None if field.default is None else spell(field.default),
            help=help_lines[field.name],
            **(alone_is_true if hints[field.name] is bool else {}),
        )
        for field in fields(config_type)
    ]


def groups(config_type: type[Config]) -> dict[str, list[str]]:
    """The names of a config's fields by the first line of the docstring of the class that defines them.

    The command's own are first; the others follow in the order in which the config inherits from their classes.
    """
    names = {field.name for field in fields(config_type)}
    by_heading: dict[str, list[str]] = {}
    for part in config_type.__mro__:
        heading = "Options" if part is config_type else (part.__doc__ or "").partition("\n")[0].rstrip(".")
        if own := [name for name in inspect.get_annotations(part) if name in names]:
            by_heading[heading] = own
            names -= {*own}
    return by_heading


def field_help(config_type: type[Any]) -> dict[str, str]:
    """The string under each field, of the class and of those it inherits from."""
    by_field: dict[str, str] = {}
    for part in reversed(config_type.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                by_field[field.target.id] = str(text.value.value)
    return by_field
