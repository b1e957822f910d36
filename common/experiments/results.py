"""The result of a finished run: the one schema of result.json, for the programs that write it and the tables that read it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from .config import Config, config_hash, identity
from .files import read_json, write_json

FORMAT = 2  # 1: config_hash is of the whole stored configuration; 2: of its identity, see common/experiments/config.py
NAME = "result.json"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A finished run.

    row:          name of the table row that the run was made for, "table/row", or None.
    script:       the program's file, such as "train.py"; empty in results of format 1, which do not have it.
    config:       the stored configuration (:meth:`Config.record`); ``config["program"]`` names the program.
    config_hash:  the run's identity when it was written.
    inputs:       digests of the files the run learned from.
    metrics:      ``final`` and ``best`` score, and what else the program measured.
    parameters:   ``compressed``, the parameters of the trained network, ``ratio`` of them to the dense network's, and
                  ``original``, the latter's.
    decays:       which parameters got which decay.
    decoding:     of translations: how they were made.
    path:         the file it was read from; not part of it.
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
        """Write result.json."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("path", "format")}
        content = {name: value for name, value in content.items() if name != "decoding" or value is not None}
        write_json(path, {"format": self.format, "status": "finished", **content})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a result.json; raises ValueError saying what is wrong with it."""
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") not in (1, FORMAT):
            raise ValueError(f"{path} is not a result of this version")
        if content.get("status") != "finished":
            raise ValueError(f"{path} is not finished: its status is {content.get('status')!r}")
        known = {f.name: content[f.name] for f in fields(cls) if f.name in content and f.name != "path"}
        missing = [
            name for name in ("row", "config", "config_hash", "seed", "metrics", "parameters", "seconds") if name not in known
        ]
        if missing:
            raise ValueError(f"{path} lacks or garbles a field: there is no {', '.join(missing)}")
        try:
            result = cls(**known, path=path)
            finite = math.isfinite(result.final) and math.isfinite(result.best)
            int(result.parameters["compressed"]), float(result.parameters["ratio"]), float(result.seconds)
            if not isinstance(result.row, str | None) or not isinstance(result.seed, int):
                raise ValueError(f"row {result.row!r}, seed {result.seed!r}")
            if not isinstance(result.script, str) or not isinstance(result.inputs, dict):
                raise ValueError(f"script {result.script!r}, inputs {result.inputs!r}")
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{path} lacks or garbles a field: {error}") from error
        if (
            not isinstance(result.config, dict)
            or not isinstance(result.config.get("program"), str)
            or (result.format == 1 and config_hash(result.config) != result.config_hash)
        ):
            raise ValueError(f"{path} has a configuration that is not the one its hash was made of")
        if not finite:
            raise ValueError(f"{path} has a final or best value that is not finite")
        return result

    def check(self, kinds: Mapping[tuple[str, str], type[Config]]) -> None:
        """Raise ValueError where a result of format 2 has another configuration than its hash was made of.

        ``kinds`` are the configurations of the programs, by program and script.
        """
        if self.format == 1:
            return  # :meth:`load` has checked it
        kind = kinds.get((self.config.get("program", ""), self.script))
        if kind is None:
            name = f"{self.config.get('program')}/{self.script}"
            raise ValueError(f"{self.path} is a result of {name}, which is no program of this version")
        unknown = sorted(self.config.keys() - kind.recorded() - {"program"})
        if unknown:
            raise ValueError(f"{self.path} is of a version with fields that this one does not know: {', '.join(unknown)}")
        if config_hash(identity(kind, self.config)) != self.config_hash:
            raise ValueError(
                f"{self.path} has a configuration that is not the one its hash was made of: the file was changed, or what the "
                "program takes for the value from before a field existed"
            )
