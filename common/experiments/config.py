"""Configurations: dataclasses whose fields are the flags of a program, and the identity of the runs that they describe.

A field says in one place what its flag is called, its help and default, whether it changes the result of a run, whether it
names an input file, and which value runs had before the field existed. From that follow

- the command line;
- the record: all fields that change the result, which a run stores;
- the identity: what is left of a record without the fields that equal the value from before they existed;
- the hash: the SHA-256 of the identity, which names directories.

This module loads without torch, so that scripts are written and errors shown at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

from .files import digest


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class FlagParser(argparse.ArgumentParser):
    """argparse whose flags take both ``-`` and ``_``, take no abbreviation, and fail in one line; paths are :func:`a_path`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self.register("type", Path, a_path)

    def parse_known_args(self, args: Any = None, namespace: Any = None, **kwargs: Any) -> Any:
        def canonical(word: str) -> str:
            flag, equals, value = word.partition("=")
            if flag.startswith("--") and value == "--":  # which argparse drops, and gives an empty list in its place
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
    """Let Ctrl-C end this process with one line in place of a traceback, and with the status that it has anyway.

    For a process of the program's own: called where it starts, before torch, which takes seconds, is loaded.
    """
    others = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print(f"{prog}: interrupted", file=sys.stderr)
        else:
            others(kind, error, trace)

    sys.excepthook = hook


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
        raise argparse.ArgumentTypeError(f"must not be negative and below 2^63, got {text}")
    return value


def a_path(text: str) -> Path:
    """The path that a flag names, with ``~`` for a home directory; shells leave it where it follows a ``=``."""
    expanded = os.path.expanduser(text)
    if not text:
        raise argparse.ArgumentTypeError("must name a file or folder, got an empty word ('.' is the current folder)")
    if expanded.startswith("~"):
        raise argparse.ArgumentTypeError(f"is in the home directory of nobody here, got {text!r} (./{text} is a name with ~)")
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
    """A field of a configuration that is a flag; a name without dashes is a positional argument.

    default:         the value without the flag; :data:`REQUIRED` where it must be given. False makes it a switch.
    names:           how it is written on a command line (default: the field's name with dashes).
    type, choices, metavar, help, group:  as argparse takes them; ``group`` defaults to that of the class;
                     an empty one is none.
    changes_result:  whether the value is part of the run's configuration; leave it out for devices, paths, and flags that
                     are short for another field.
    input_file:      whether the value is the path of a file that the run reads. Recorded is whether it was given, and the
                     digest of the file.
    before:          what runs did before this field existed, or before its default changed, where that is not the default.
                     Results stored without the field are read as having this value.
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
    """A field that is recorded but is no flag: :meth:`Config.resolve` sets it from others.

    With a default of :data:`REQUIRED` it is set in any case, and recorded whatever it is.
    """
    metadata = {"changes_result": True, "input_file": input_file, "before": False if input_file else default}
    return _field(None if default is REQUIRED else default, metadata)


def _field(default: Any, metadata: Mapping[str, Any]) -> Any:
    """A field of a dataclass; a default that is a list is copied for each instance."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def override(kind: type[Config], name: str, default: Any = MISSING, **options: Any) -> Any:
    """The field of this name of a base class, with another default or other options of :func:`flag`.

    ``before`` is the new default unless it is given: the class is one that had it from the start.
    """
    field = kind.__dataclass_fields__[name]
    kept = {**field.metadata["options"], **{key: field.metadata[key] for key in ("group", "changes_result", "input_file")}}
    names = options.pop("names", field.metadata["names"])
    if default is MISSING and field.metadata["before"] != field.default:
        options.setdefault("before", field.metadata["before"])
    return flag(field.default if default is MISSING else default, *names, **(kept | options))


@dataclass(kw_only=True)
class Config:
    """Base of the configurations of programs; subclasses add fields made by :func:`flag`.

    Fields whose default depends on others are None until :meth:`resolve` sets them; their types are those they then have.

    program, script, description:  of the program, such as "resnet_cifar", "train.py" and a sentence for --help.
    group:                         title under which --help lists the fields of this class; subclasses do not inherit it.
    """

    program: ClassVar[str] = ""
    script: ClassVar[str] = "train.py"
    description: ClassVar[str] = ""
    group: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        self.resolve()

    def resolve(self) -> None:
        """Complete the fields and check them against each other; raises ValueError. A second call changes nothing."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.metadata.get("input_file") and "names" in field.metadata and value is not None and value.is_dir():
                raise ValueError(f"--{field.name.replace('_', '-')} {value} is a folder: give a file in it")

    def run_name(self) -> str:
        """What the run's directory is called where neither --save-dir nor --row name it."""
        return "run"

    @classmethod
    def prog(cls) -> str:
        """The program as its messages name it."""
        return f"{cls.program}/{cls.script}"

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """Add the flags of all fields to a parser, in groups."""
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
        """The configuration of a command line. A wrong one ends the process: one line on stderr, exit status 2."""
        parser = cls.parser()
        return cls.from_flags(parser, vars(parser.parse_args(argv)))

    @classmethod
    def from_flags(cls, parser: FlagParser, values: Mapping[str, Any]) -> Self:
        """The configuration of parsed flags; wrong ones end the program as in :meth:`parse`."""
        try:
            return cls(**{name: list(value) if isinstance(value, list) else value for name, value in values.items()})
        except ValueError as error:
            parser.error(str(error))

    @classmethod
    @cache
    def before(cls) -> dict[str, Any]:
        """What each recorded field was before it existed; fields that must be given are left out."""
        fields = [field for field in dataclasses.fields(cls) if field.metadata.get("changes_result")]
        return {field.name: field.metadata["before"] for field in fields if field.metadata["before"] is not MISSING}

    @classmethod
    def recorded(cls) -> set[str]:
        """Names of the fields that change the result."""
        return {field.name for field in dataclasses.fields(cls) if field.metadata.get("changes_result")}

    def record(self) -> dict[str, Any]:
        """Every field that changes the result, and the program: what a run stores as its configuration."""
        found: dict[str, Any] = {}
        for field in sorted(dataclasses.fields(self), key=lambda field: field.name):
            if field.metadata.get("changes_result"):
                value = getattr(self, field.name)
                found[field.name] = value is not None if field.metadata["input_file"] else value
        return {"program": self.program, **found}

    def input_paths(self) -> dict[str, Path]:
        """The files and folders that the run learns from, by the name under which their digests are recorded."""
        names = [field.name for field in dataclasses.fields(self) if field.metadata.get("input_file")]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def inputs(self) -> dict[str, str]:
        """Digests of :meth:`input_paths`, as far as these exist."""
        return {name: digest(path) for name, path in self.input_paths().items() if path.exists()}

    def config_hash(self) -> str:
        """Identity of the runs of this configuration."""
        return config_hash(identity(type(self), self.record()))


def completed(kind: type[Config], record: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration with the fields that it was stored without."""
    return {**kind.before(), **record}


def identity(kind: type[Config], record: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a stored configuration from others: the values that differ from what runs did before their field existed."""
    before = kind.before()
    return {key: value for key, value in record.items() if key not in before or value != before[key]}


def config_hash(content: Mapping[str, Any]) -> str:
    """12 hexadecimal digits of the SHA-256 of a mapping's canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def differing_values(held: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, str]:
    """The keys at which two records differ, each with both values in words."""
    keys = sorted(key for key in held.keys() | ours.keys() if held.get(key) != ours.get(key))
    return {key: f"{key} {held.get(key)!r} there, {ours.get(key)!r} here" for key in keys}
