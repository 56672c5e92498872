"""Dataclasses as command lines: one option per field, with the docstring below the field as its help.

Uses Python's argparse, so help and error messages need no package and look the same in a terminal and in a pipe.
"""

import argparse
import ast
import difflib
import inspect
import math
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, cast, get_args, get_origin, get_type_hints

Kind = TypeVar("Kind")
_WIDEST = 100
_METAVARS = {int: "N", float: "X", Path: "PATH", str: "NAME"}


class UsageError(ValueError):
    """A mistake on the command line, in one line."""


@dataclass(frozen=True)
class Positional:
    """Marks a field that is given without an option's name. `metavar` is its name in the help."""

    metavar: str


@dataclass(frozen=True)
class Inline:
    """Marks a dataclass whose options have no prefix."""


@dataclass(frozen=True)
class Option:
    """One field as an option."""

    name: str
    """Path of the field: `recipe.batch_size`."""
    kind: Any
    """Type of its value, or of each of its values."""
    many: bool
    optional: bool
    """Whether it can be None, which is written `none`."""
    positional: bool
    metavar: str
    help: str
    default: Any
    """MISSING if it must be given."""
    group: str
    """First paragraph of the class docstring, for options with a prefix."""

    @property
    def flag(self) -> str:
        """Its name on the command line: `--recipe.batch-size`."""
        return self.metavar if self.positional else f"--{self.name.replace('_', '-')}"

    @property
    def off(self) -> str | None:
        """The flag that turns it off, if an experiment may turn it on: `--data.no-flip`."""
        prefix, dot, last = self.flag.rpartition(".")
        return f"{prefix}.no-{last}" if self.kind is bool and dot else None


def options_of(kind: type, default: Any = MISSING) -> list[Option]:
    """All options of a command.

    Args:
        kind: its dataclass. Fields that are dataclasses give options with the field's name as a prefix.
        default: an object that has some of its fields: the defaults that the help shows.

    Example:
        >>> from stochastic_depth_lab.experiments.config import Regularizers
        >>> [option.flag for option in options_of(Regularizers)]
        ['--activation-survival-prob', '--filter-survival-prob', '--filter-penalty']
    """
    return list(_options(kind, default, ""))


def _options(kind: type, default: Any, prefix: str) -> Iterator[Option]:
    texts, hints = _field_texts(kind), get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        annotation, marks = hints[field.name], ()
        if get_origin(annotation) is Annotated:
            annotation, *marks = get_args(annotation)
        value = getattr(default, field.name, field.default)
        optional = NoneType in get_args(annotation)
        if optional:
            annotation = next(each for each in get_args(annotation) if each is not NoneType)
        if get_origin(annotation) is Annotated:
            annotation, *marks = get_args(annotation)
        if is_dataclass(annotation):
            inner = prefix if any(isinstance(mark, Inline) for mark in marks) else f"{prefix}{field.name}."
            yield from _options(cast(type, annotation), value, inner)
            continue
        many = get_origin(annotation) is tuple
        if many:
            annotation = get_args(annotation)[0]
        position = next((mark for mark in marks if isinstance(mark, Positional)), None)
        metavar = next((mark for mark in marks if isinstance(mark, str)), _METAVARS.get(annotation, ""))
        if get_origin(annotation) is Literal:
            metavar = "{" + ",".join(get_args(annotation)) + "}"
        yield Option(
            name=prefix + field.name,
            kind=annotation,
            many=many,
            optional=optional,
            positional=position is not None,
            metavar=position.metavar if position else metavar,
            help=texts.get(field.name, ""),
            default=value,
            group=summary(kind) if prefix else "",
        )


def read(kind: type, program: str, words: Sequence[str]) -> dict[str, Any]:
    """The fields that a command line sets, by their paths.

    Args:
        kind: the command's dataclass.
        program: the start of its usage: `stochastic-depth train`.
        words: the words after the command. Underscores in an option's name count as dashes.

    Raises:
        UsageError: for a mistake.
    """
    options = options_of(kind)
    parser = _Parser(prog=program, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for option in options:
        if not option.positional:
            _add(parser, option)
    given, rest = parser.parse_known_args([_dashed(word) for word in words])
    values = vars(given)
    flags = [flag for option in options if not option.positional for flag in (option.flag, option.off) if flag]
    for word in rest:
        if word.startswith("--") and word != "--":
            name = word.partition("=")[0]
            raise UsageError(f"Unknown option {name!r}.{did_you_mean(name, flags)}")
    rest = [word for word in rest if word != "--"]
    for option in options:
        if option.positional and rest:
            taken, rest = (rest, []) if option.many else (rest[:1], rest[1:])
            converted = [_converted(option, word) for word in taken]
            values[option.name] = tuple(converted) if option.many else converted[0]
    if rest:
        raise UsageError(f"Unexpected argument {rest[0]!r}.")
    return values


def build(kind: type[Kind], given: Mapping[str, Any], default: Any = MISSING, prefix: str = "") -> Kind:
    """An object of a command's dataclass from the fields that the command line sets.

    Args:
        kind: the dataclass.
        given: fields from `read`.
        default: an object whose other fields are kept; MISSING: the defaults of the dataclass.
        prefix: of its fields in `given`.

    Raises:
        UsageError: if a field without a default is missing.
    """
    values: dict[str, Any] = {}
    options = {option.name: option for option in _options(kind, default, prefix)}
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(cast(Any, kind)):
        name, annotation = prefix + field.name, hints[field.name]
        marks = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
        inner = get_args(annotation)[0] if marks else annotation
        inner = next((each for each in get_args(inner) if is_dataclass(each)), inner)
        value = getattr(default, field.name, field.default)
        if not is_dataclass(inner):
            value = given.get(name, value)
            if value is MISSING:
                option = options[name]
                missing = option.flag if option.positional else f"{option.flag} {option.metavar}"
                raise UsageError(f"Missing {missing}: {_first_sentence(option.help)}")
        elif any(isinstance(mark, Inline) for mark in marks):
            value = build(cast(Any, inner), given, value, prefix)
        elif value is not None or any(key.startswith(f"{name}.") for key in given):
            value = build(cast(Any, inner), given, MISSING if value is None else value, f"{name}.")
        values[field.name] = value
    return kind(**values)


def help_text(
    kind: type, program: str, default: Any = MISSING, texts: Mapping[str, str] | None = None, *, prefixed_defaults: bool
) -> str:
    """The text of `--help`, as wide as the terminal.

    Args:
        kind: the command's dataclass.
        program: the start of the usage.
        default: as in `options_of`.
        texts: help of fields that have no docstring.
        prefixed_defaults: whether to show the defaults of options with a prefix.
    """
    options = options_of(kind, default)
    needed = [option for option in options if option.default is MISSING and not option.name.count(".")]
    usage = " ".join(
        [
            program,
            *(option.metavar + (" ..." if option.many else "") for option in needed if option.positional),
            *(f"{option.flag} {option.metavar}" for option in needed if not option.positional),
            "[options]",
        ]
    )
    description, _, examples = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")
    parser = _Parser(
        prog=program,
        usage=usage,
        description=description,
        epilog=examples,
        add_help=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_Formatter,
    )
    vars(parser)["color"] = False  # Python 3.14 has it
    groups = {name: parser.add_argument_group(name or "Options") for name in ("Arguments", "")}
    for option in options:
        if option.positional:
            text = _with_default((texts or {}).get(option.name, option.help), option)
            groups["Arguments"].add_argument(option.name, metavar=option.metavar, help=_escaped(text))
            continue
        prefix = option.name.rpartition(".")[0]
        if prefix not in groups:
            groups[prefix] = parser.add_argument_group(f"{prefix.capitalize()} options", option.group)
        _add(groups[prefix], option, show_default=prefixed_defaults or not prefix)
    groups[""].add_argument("-h", "--help", action="store_true", help="Show this help.")
    return parser.format_help()


def summary(kind: type) -> str:
    """The first paragraph of a class docstring, in one line."""
    return " ".join(inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].split())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question about a misspelled word, after a space; empty if no known word is similar.

    Example:
        >>> did_you_mean("trian", ["train", "report"])
        " Did you mean 'train'?"
    """
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting, in our words."""
        where, _, what = message.removeprefix("argument ").partition(": ")
        where = where.partition("/")[0]
        if what.startswith("must "):
            raise UsageError(f"{where} {what}")
        if what.startswith("expected"):
            raise UsageError(f"{where} needs a value.")
        if what.startswith("ignored explicit argument"):
            raise UsageError(f"{where} takes no value.")
        raise UsageError(f"{message}.")


class _Formatter(argparse.HelpFormatter):
    """Keeps the line breaks of examples, and wraps everything else."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, _WIDEST) - 1
        super().__init__(prog, max_help_position=26, width=width)

    def add_usage(self, usage: str | None, actions: Any, groups: Any, prefix: str | None = None) -> None:
        super().add_usage(usage, actions, groups, prefix or "Usage: ")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return text
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # names of options and experiments stay whole


def _add(group: Any, option: Option, *, show_default: bool = True) -> None:
    text = _escaped(_with_default(option.help, option) if show_default else option.help)
    if option.kind is bool:
        group.add_argument(option.flag, dest=option.name, action="store_true", help=text)
        if option.off:
            group.add_argument(option.off, dest=option.name, action="store_false", help=f"Turn {option.flag} off.")
        return
    group.add_argument(
        option.flag,
        dest=option.name,
        metavar=option.metavar,
        type=_converter(option),
        help=text,
        **({"nargs": "+", "action": _Tuple} if option.many else {}),
    )


class _Tuple(argparse.Action):
    def __call__(self, _parser: Any, namespace: argparse.Namespace, values: Any, _option: str | None = None) -> None:
        setattr(namespace, self.dest, None if values == [None] else tuple(values))


def _converter(option: Option) -> Callable[[str], Any]:
    def convert(word: str) -> Any:
        if option.optional and word.lower() == "none":
            return None
        if get_origin(option.kind) is Literal:
            choices: tuple[str, ...] = get_args(option.kind)
            if word not in choices:
                raise argparse.ArgumentTypeError(
                    f"must be {' or '.join([', '.join(choices[:-1]), choices[-1]])}, but is {word!r}."
                    + did_you_mean(word, choices)
                )
            return word
        if option.kind is Path and not word:
            raise argparse.ArgumentTypeError("must not be empty.")
        try:
            value: Any = option.kind(word)
        except ValueError:
            kind = "a whole number" if option.kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {kind}, but is {word!r}.") from None
        if option.kind is float and math.isnan(value):
            raise argparse.ArgumentTypeError(f"must be a number, but is {word!r}.")
        return value

    return convert


def _converted(option: Option, word: str) -> Any:
    try:
        return _converter(option)(word)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{option.metavar} {error}") from None


def _with_default(text: str, option: Option) -> str:
    value = option.default
    if value is MISSING or value is None or value == () or (option.kind is bool and not option.off):
        return text
    if option.kind is bool:
        value = "yes" if value else "no"
    shown = " ".join(map(str, cast("tuple[Any, ...]", value))) if option.many else str(value)
    return f"{text.removesuffix('.')} (default: {shown})."


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def _dashed(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _first_sentence(text: str) -> str:
    text = re.split(r"(?<=\.) ", text)[0]
    return text[:1].lower() + text[1:]


@cache
def _field_texts(kind: type) -> dict[str, str]:
    """The docstrings below the fields of a class, each in one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    texts: dict[str, str] = {}
    for before, after in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and isinstance(after, ast.Expr):
            text = ast.literal_eval(after.value)
            texts[before.target.id] = " ".join(str(text).split())
    return texts
