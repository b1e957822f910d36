"""Configurations: dataclasses whose fields are the flags of a program, and the identity of the runs that they describe.

A field declares in one place the name, help and default of its flag, whether it changes the result of a run, whether it
names an input file, and which value runs had before the field existed. Four things are derived from these declarations:

- the command line;
- the record: all fields that change the result. A run stores it;
- the identity: the fields of a record whose values differ from those that runs had before the fields existed;
- the hash: the first 12 hexadecimal digits of the SHA-256 of the identity. It names directories.

This module does not import torch, so that programs can write scripts and report errors without delay.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

from .files import digest


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, "") else super()._get_help_string(action)


class FlagParser(argparse.ArgumentParser):
    """An argparse parser that accepts flags with ``-`` or ``_``, refuses abbreviations, and reports errors in one line.

    Flags of type Path are parsed by :func:`a_path`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self.register("type", Path, a_path)

    def parse_known_args(self, args: Any = None, namespace: Any = None, **kwargs: Any) -> Any:
        def canonical(word: str) -> str:
            flag, equals, value = word.partition("=")
            if flag.startswith("--") and value == "--":  # argparse would replace it with an empty list
                self.error(f"argument {flag}: expected a value, got '--'")
            dashed = flag.replace("_", "-")
            known = flag.startswith("--") and flag not in self._option_string_actions and dashed in self._option_string_actions
            return dashed + equals + value if known else word

        return super().parse_known_args(
            [canonical(word) for word in (sys.argv[1:] if args is None else args)], namespace, **kwargs
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help lists the flags)\n")


def say_interrupted(prog: str) -> None:
    """Make Ctrl-C print one line instead of a traceback. The exit status stays the same.

    This changes the whole process, so only a program's entry point calls it. It does so before it imports torch, which takes
    seconds.
    """
    others = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print(f"{prog}: interrupted", file=sys.stderr)
        else:
            others(kind, error, trace)

    sys.excepthook = hook


def exit_on_sigterm() -> None:
    """Make SIGTERM raise SystemExit, so that ``finally`` removes what is half written. Only an entry point calls it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def positive_int(text: str) -> int:
    value = int(text)
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must be at least 1 and below 2^31, got {text}")
    return value


def non_negative(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"must be finite and not negative, got {text}")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}")
    return value


def natural(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 2^63, got {text}")
    return value


def a_path(text: str) -> Path:
    """The path that a flag names, with ``~`` expanded to a home directory. Shells do not expand ``~`` after a ``=``."""
    expanded = os.path.expanduser(text)
    if not text:
        raise argparse.ArgumentTypeError("must name a file or folder, got an empty string ('.' is the current folder)")
    if expanded.startswith("~"):
        raise argparse.ArgumentTypeError(f"names the home directory of an unknown user: {text!r} (./{text} is a name with ~)")
    return Path(expanded)


REQUIRED: Any = MISSING  # the default of a flag that must be given


def flag(
    default: Any,
    *names: str,
    help: str | None = None,
    type: Callable[[str], Any] | None = None,
    choices: Sequence[Any] | None = None,
    metavar: str | None = None,
    group: str | None = None,
    changes_result: bool = True,
    input_file: bool = False,
    before: Any = MISSING,
) -> Any:
    """A field of a configuration that is also a flag. A name without leading dashes makes it a positional argument.

    default:         the value if the flag is not given. :data:`REQUIRED` makes the flag mandatory; False makes it a switch.
    names:           how the flag is written on a command line (default: the field's name with dashes).
    type, choices, metavar, help:  as for argparse.
    group:           title of the argparse group (default: that of the class). An empty string means no group.
    changes_result:  whether the value is part of the run's configuration. False for devices, paths, and flags that are
                     short for another field.
    input_file:      whether the value is the path of a file that the run reads. The configuration then records only whether
                     the path was given; the run also records the digest of the file.
    before:          the value that runs had before this field existed, or before its default changed (default: ``default``,
                     or False with ``input_file``). Results stored without the field are read as having this value.
    """
    options = {"type": type, "choices": choices, "metavar": metavar, "help": help}
    metadata = {
        "names": names,
        "options": {key: value for key, value in options.items() if value is not None},
        "group": group,
        "changes_result": changes_result,
        "input_file": input_file,
        "before": (False if input_file else default) if before is MISSING else before,
    }
    return _field(default, metadata)


def derived(default: Any, *, input_file: bool = False) -> Any:
    """A field that is recorded but is not a flag: :meth:`Config.resolve` sets it from other fields.

    With the default :data:`REQUIRED`, ``resolve`` must always set it, and every value of it is part of the identity.
    """
    metadata = {"changes_result": True, "input_file": input_file, "before": False if input_file else default}
    return _field(None if default is REQUIRED else default, metadata)


def _field(default: Any, metadata: Mapping[str, Any]) -> Any:
    """A dataclass field. Each instance gets its own copy of a default that is a list."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def override(kind: type[Config], name: str, default: Any = MISSING, **options: Any) -> Any:
    """The field of this name in a base class, with another default or other options of :func:`flag`.

    Unless ``before`` is given, a new default is also the value of ``before``: the class had this default from the start.
    Without a new default, ``before`` is inherited.
    """
    field = kind.__dataclass_fields__[name]
    kept = {**field.metadata["options"], **{key: field.metadata[key] for key in ("group", "changes_result", "input_file")}}
    names = options.pop("names", field.metadata["names"])
    if default is MISSING and field.metadata["before"] != field.default:
        options.setdefault("before", field.metadata["before"])
    return flag(field.default if default is MISSING else default, *names, **(kept | options))


@dataclass(kw_only=True)
class Config:
    """Base class of the configurations of programs. Subclasses add fields made by :func:`flag`.

    A field whose default depends on other fields is None until :meth:`resolve` sets it. It is annotated with the type that it
    has afterwards.

    program, script, description:  of the program: its package, such as "resnet_cifar", its file, such as "train.py", and a
                                   sentence for --help.
    group:                         title under which --help lists the fields of this class. Subclasses do not inherit it.
    """

    program: ClassVar[str] = ""
    script: ClassVar[str] = "train.py"
    description: ClassVar[str] = ""
    group: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        self.resolve()

    def resolve(self) -> None:
        """Set the remaining fields and check all fields together. A second call changes nothing.

        Raises ValueError if a value does not fit the others.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.metadata.get("input_file") and "names" in field.metadata and value is not None and value.is_dir():
                raise ValueError(f"--{field.name.replace('_', '-')} {value} is a folder: give a file in it")

    def run_name(self) -> str:
        """Name of the run's directory if neither --save-dir nor --row gives one."""
        return "run"

    @classmethod
    def prog(cls) -> str:
        """The name of the program in its messages."""
        return f"{cls.program}/{cls.script}"

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """Add the flags of all fields to a parser, sorted into groups."""
        groups: dict[str | None, Any] = {None: parser}
        homes: dict[str, Any] = {name: base for base in cls.__mro__ for name in inspect.get_annotations(base)}
        for field in dataclasses.fields(cls):
            if "names" not in field.metadata:
                continue
            title = field.metadata["group"]
            if title is None:
                title = vars(homes[field.name]).get("group") or ""
            title = title.format(cls=cls) or None
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            names = field.metadata["names"] or ("--" + field.name.replace("_", "-"),)
            options = dict(field.metadata["options"])
            if field.default is not REQUIRED or field.default_factory is not MISSING:
                options["default"] = field.default if field.default is not MISSING else field.default_factory()  # type: ignore
            elif names[0].startswith("-"):
                options["required"] = True
            if field.default is False:
                options["action"] = "store_true"
            if names[0].startswith("-"):
                options["dest"] = field.name
            groups[title].add_argument(*names, **options)

    @classmethod
    @cache
    def parser(cls) -> FlagParser:
        """The parser of the program's command line."""
        parser = FlagParser(prog=cls.prog(), description=cls.description)
        cls.add_flags(parser)
        return parser

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None) -> Self:
        """The configuration of a command line. An invalid one ends the process with one line on stderr and exit status 2."""
        parser = cls.parser()
        return cls.from_flags(parser, vars(parser.parse_args(argv)))

    @classmethod
    def from_flags(cls, parser: FlagParser, values: Mapping[str, Any]) -> Self:
        """The configuration of parsed flags. Invalid ones end the process as in :meth:`parse`."""
        try:
            return cls(**{name: list(value) if isinstance(value, list) else value for name, value in values.items()})
        except ValueError as error:
            parser.error(str(error))

    @classmethod
    @cache
    def before(cls) -> dict[str, Any]:
        """The value that runs had before each recorded field existed. Fields that must be given have no entry."""
        fields = [field for field in dataclasses.fields(cls) if field.metadata.get("changes_result")]
        return {field.name: field.metadata["before"] for field in fields if field.metadata["before"] is not MISSING}

    @classmethod
    def recorded(cls) -> set[str]:
        """Names of the fields that change the result."""
        return {field.name for field in dataclasses.fields(cls) if field.metadata.get("changes_result")}

    def record(self) -> dict[str, Any]:
        """The program and every field that changes the result. A run stores this as its configuration."""
        found: dict[str, Any] = {}
        for field in sorted(dataclasses.fields(self), key=lambda field: field.name):
            if field.metadata.get("changes_result"):
                value = getattr(self, field.name)
                found[field.name] = value is not None if field.metadata["input_file"] else value
        return {"program": self.program, **found}

    def input_paths(self) -> dict[str, Path]:
        """The files and folders that the run reads, by the names under which their digests are recorded."""
        names = [field.name for field in dataclasses.fields(self) if field.metadata.get("input_file")]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def inputs(self) -> dict[str, str]:
        """Digests of those :meth:`input_paths` that exist."""
        return {name: digest(path) for name, path in self.input_paths().items() if path.exists()}

    def config_hash(self) -> str:
        """Hash of the identity that all runs of this configuration share."""
        return config_hash(identity(type(self), self.record()))


def completed(kind: type[Config], record: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration, with the fields that it lacks set to their values from before they existed."""
    return {**kind.before(), **record}


def identity(kind: type[Config], record: Mapping[str, Any]) -> dict[str, Any]:
    """The values that identify a stored configuration: those that differ from the value from before their field existed."""
    before = kind.before()
    return {key: value for key, value in record.items() if key not in before or value != before[key]}


def config_hash(content: Mapping[str, Any]) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of a mapping's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def differing_values(held: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, str]:
    """The keys at which two records differ, each with a phrase that states both values."""
    keys = sorted(key for key in held.keys() | ours.keys() if held.get(key) != ours.get(key))
    return {key: f"{key} {held.get(key)!r} there, {ours.get(key)!r} here" for key in keys}
