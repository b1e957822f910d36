"""The result of a finished run: the schema of result.json, shared by the programs that write it and the tables that read it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from .config import Config, config_hash, identity
from .files import read_json, write_json

FORMAT = 2  # config_hash covers the whole stored configuration in format 1, and its identity (see config.py) in format 2
NAME = "result.json"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of a finished run.

    row:          name of the table row that the run was made for, "table/row", or None.
    script:       the program's file, such as "train.py". Empty in results of format 1, which do not store it.
    config:       the stored configuration (:meth:`Config.record`). ``config["program"]`` names the program.
    config_hash:  hash of the run's identity when the result was written.
    inputs:       digests of the files that the run read.
    metrics:      the ``final`` and ``best`` score, and other values that the program measured.
    parameters:   numbers of parameters: ``original``, of the dense network; ``compressed``, of the trained network; and
                  ``ratio``, the second divided by the first.
    decays:       the decay of each group of parameters.
    decoding:     for translations, the settings of the decoder.
    seconds:      duration of the training.
    path:         the file that the result was read from. It is not stored.
    """

    row: str | None
    script: str = ""
    config: dict[str, Any]
    config_hash: str
    seed: int
    inputs: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any]
    parameters: dict[str, Any]
    decays: list[dict[str, Any]] = field(default_factory=list)
    decoding: dict[str, Any] | None = None
    seconds: float
    environment: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    path: Path = Path()

    @property
    def final(self) -> float:
        return float(self.metrics["final"])

    @property
    def best(self) -> float:
        return float(self.metrics["best"])

    def save(self, path: Path) -> None:
        """Write the result to a result.json."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("path", "format")}
        content = {name: value for name, value in content.items() if name != "decoding" or value is not None}
        write_json(path, {"format": self.format, "status": "finished", **content})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a result.json. Raises ValueError, which says what is wrong, if it is not a valid result."""
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") not in (1, FORMAT):
            raise ValueError(f"{path} is not a result in a format that this version reads")
        if content.get("status") != "finished":
            raise ValueError(f"{path} is not finished: its status is {content.get('status')!r}")
        known = {f.name: content[f.name] for f in fields(cls) if f.name in content and f.name != "path"}
        missing = [
            name for name in ("row", "config", "config_hash", "seed", "metrics", "parameters", "seconds") if name not in known
        ]
        if missing:
            raise ValueError(f"{path} lacks these fields: {', '.join(missing)}")
        try:
            result = cls(**known, path=path)
            finite = math.isfinite(result.final) and math.isfinite(result.best)
            int(result.parameters["compressed"]), float(result.parameters["ratio"]), float(result.seconds)
            if not isinstance(result.row, str | None) or not isinstance(result.seed, int):
                raise ValueError(f"row {result.row!r}, seed {result.seed!r}")
            if not isinstance(result.script, str) or not isinstance(result.inputs, dict):
                raise ValueError(f"script {result.script!r}, inputs {result.inputs!r}")
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{path} has a missing or invalid field: {error}") from error
        if (
            not isinstance(result.config, dict)
            or not isinstance(result.config.get("program"), str)
            or (result.format == 1 and config_hash(result.config) != result.config_hash)
        ):
            raise ValueError(f"{path} has a configuration that does not match its hash")
        if not finite:
            raise ValueError(f"{path} has a final or best value that is not finite")
        return result

    def check(self, kinds: Mapping[tuple[str, str], type[Config]]) -> None:
        """Raise ValueError if the configuration does not match its hash, or if its program or a field of it is unknown.

        ``kinds`` maps program and script to the program's configuration class. Results of format 1 are not checked here,
        because :meth:`load` has checked their hash.
        """
        if self.format == 1:
            return
        kind = kinds.get((self.config.get("program", ""), self.script))
        if kind is None:
            name = f"{self.config.get('program')}/{self.script}"
            raise ValueError(f"{self.path} is a result of {name}, which is not a program of this version")
        unknown = sorted(self.config.keys() - kind.recorded() - {"program"})
        if unknown:
            raise ValueError(f"{self.path} comes from another version: it has the unknown fields {', '.join(unknown)}")
        if config_hash(identity(kind, self.config)) != self.config_hash:
            raise ValueError(
                f"{self.path} has a configuration that does not match its hash: the file was edited, or the 'before' value of "
                "a field was changed in the program"
            )
