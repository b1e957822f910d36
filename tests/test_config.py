"""Configurations: flags made of fields, what is recorded, and which runs are the same one."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import pytest

from common.experiments.config import (
    REQUIRED,
    Config,
    FlagParser,
    completed,
    config_hash,
    derived,
    flag,
    identity,
    override,
    positive_int,
)
from common.experiments.files import read_json
from common.experiments.runs import Run, run_directory
from common.tables.rows import programs
from resnet_cifar.config import ResNetConfig


@dataclass(kw_only=True)
class Base(Config):
    """A configuration as a first version had it."""

    program: ClassVar[str] = "p"
    group: ClassVar[str | None] = "first"

    steps: int = flag(10, "-s", "--steps", type=positive_int)
    max_steps: int | None = flag(None, type=positive_int)
    levels: list[int] = flag([1, 2], type=json.loads, metavar="LIST")
    weights: Path | None = flag(None, type=Path, input_file=True)
    device: str = flag("auto", changes_result=False)
    fast: bool = flag(False)
    speed: str = derived(REQUIRED)

    def resolve(self) -> None:
        if self.steps == 13:
            raise ValueError("--steps must not be 13: give another number")
        self.speed = "high" if self.fast else "low"


@dataclass(kw_only=True)
class Inert(Base):
    """A later version, with a flag that leaves things as they were."""

    verbose_rank: bool = flag(False)


@dataclass(kw_only=True)
class Behaving(Inert):
    """A later version that does something else by default."""

    bias: str = flag("zero", choices=("zero", "default"), before="default")


def test_flags_are_made_of_fields():
    made = Base.parse(["-s", "3", "--fast", "--levels", "[4]", "--weights=w.pt"])
    assert (made.steps, made.fast, made.levels, made.weights, made.speed) == (3, True, [4], Path("w.pt"), "high")
    assert Base.parse([]).levels is not Base.parse([]).levels
    assert "first:" in Base.parser().format_help()


@pytest.mark.parametrize("flag_of_a_field", [True, False])
def test_paths_are_those_of_home_directories_and_never_empty(tmp_path, monkeypatch, capsys, flag_of_a_field):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = FlagParser(prog="p")
    parser.add_argument("--weights", type=Path)
    parse = Base.parse if flag_of_a_field else parser.parse_args
    for text, expected in (("~/w.pt", tmp_path / "w.pt"), ("~", tmp_path), ("a~b", Path("a~b")), ("./~", Path("~"))):
        expected = tmp_path / "w.pt" if flag_of_a_field and text == "~" else expected  # a folder is refused there
        assert parse([f"--weights={'~/w.pt' if expected.name == 'w.pt' else text}"]).weights == expected
    for text, message in (("", "must name a file or folder, got an empty"), ("~nobody-of-this-name/w", "of an unknown user")):
        with pytest.raises(SystemExit):
            parse(["--weights", text])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps 0", "must be at least 1"),
        ("--steps 13", "--steps must not be 13: give another number"),
        ("--speed high", "unrecognized arguments: --speed high"),
        ("--fas", "unrecognized arguments: --fas"),
    ],
)
def test_wrong_flags_end_in_one_line(refuses, words, message):
    refuses(Base.parse, words, message)


def test_a_positional_and_a_required_flag_must_be_given(refuses):
    @dataclass(kw_only=True)
    class Needy(Config):
        program: ClassVar[str] = "p"
        data: str = flag(REQUIRED, "data")
        method: str = flag(REQUIRED, choices=("a", "b"))

    assert Needy.parse(["x", "--method", "a"]).record() == {"program": "p", "data": "x", "method": "a"}
    refuses(Needy.parse, "x", "the following arguments are required: --method")
    refuses(Needy.parse, "--method a", "the following arguments are required: data")


def test_changed_fields_keep_what_is_not_changed():
    @dataclass(kw_only=True)
    class Other(Base):
        steps: int = override(Base, "steps", 20)

    assert (Other.parse([]).steps, Other.parse(["-s", "5"]).steps) == (20, 5)
    assert identity(Other, Other.parse([]).record()) == {"program": "p", "speed": "low"}


def test_overridden_fields_keep_what_was_before_unless_their_default_changes():
    @dataclass(kw_only=True)
    class Kept(Behaving):
        bias: str = override(Behaving, "bias", help="another text")

    @dataclass(kw_only=True)
    class Own(Behaving):
        bias: str = override(Behaving, "bias", "default")

    assert (Kept.before()["bias"], Own.before()["bias"]) == ("default", "default")
    assert Kept.parse([]).config_hash() == Behaving.parse([]).config_hash()


def test_what_changes_the_result_is_recorded_and_files_by_their_digest(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"weights")
    made = Base.parse(["--device", "cpu", "--weights", str(tmp_path / "w.pt")])
    assert made.record() == {
        "program": "p", "fast": False, "levels": [1, 2], "max_steps": None, "speed": "low", "steps": 10, "weights": True,
    }  # fmt: skip
    before = made.inputs()
    (tmp_path / "w.pt").write_bytes(b"others")
    assert list(before) == list(made.inputs()) == ["weights"]
    assert before != made.inputs()


def test_an_inert_field_leaves_the_identity_and_another_default_does_not():
    old = Base.parse(["--steps", "5"]).record()
    assert identity(Inert, Inert.parse(["--steps", "5"]).record()) == identity(Inert, old) == identity(Base, old)
    assert Inert.parse(["--steps", "5", "--verbose-rank"]).config_hash() != config_hash(identity(Inert, old))
    assert Behaving.parse(["--steps", "5"]).config_hash() != config_hash(identity(Behaving, old))
    assert Behaving.parse(["--steps", "5", "--bias", "default"]).config_hash() == config_hash(identity(Behaving, old))
    assert completed(Behaving, old)["bias"] == "default"


def begun(path, made, **options):
    run = Run(path, made.record(), 1, kind=type(made), **options)
    run.begin()
    run._lock.close()
    return run


def test_runs_of_an_earlier_version_are_resumed_and_known_to_be_finished(tmp_path):
    begun(tmp_path / "r", Base.parse([]))
    run = begun(tmp_path / "r", Inert.parse([]), resume=True)
    with pytest.raises(ValueError, match=r"another configuration \(bias 'default' there, 'zero' here\)"):
        Run(tmp_path / "r", Behaving.parse([]).record(), 1, kind=Behaving, resume=True)
    run.finish(metrics={"final": 1.0, "best": 1.0}, parameters={"compressed": 1, "ratio": 1.0}, seconds=1.0)
    assert read_json(tmp_path / "r" / "result.json")["config_hash"] == Base.parse([]).config_hash()
    assert Run(tmp_path / "r", Inert.parse([]).record(), 1, kind=Inert).finished


def test_the_row_of_a_script_of_an_earlier_version_is_kept(tmp_path):
    """It gives the hash of format 1, of the whole record."""
    record = Base.parse([]).record()
    for row_config, row in ((config_hash(record), "t/r"), (Base.parse([]).config_hash(), "t/r"), ("another", None)):
        assert Run(tmp_path, record, 1, kind=Base, row="t/r", row_config=row_config).row == row


def test_a_run_is_found_where_an_earlier_version_put_it(tmp_path):
    record = Base.parse([]).record()
    named = run_directory(tmp_path, Base, record, 1)
    assert named == tmp_path / Base.parse([]).config_hash() / "seed1"
    begun(tmp_path / "old-name" / "seed1", Base.parse([]))
    begun(tmp_path / "another" / "seed1", Base.parse(["--steps", "5"]))
    assert run_directory(tmp_path, Inert, Inert.parse([]).record(), 1) == tmp_path / "old-name" / "seed1"
    begun(tmp_path / "zz" / "seed1", Base.parse([]))
    (tmp_path / "zz" / "seed1" / "result.json").write_text("{}")  # of two, the one with a result
    assert run_directory(tmp_path, Inert, Inert.parse([]).record(), 1) == tmp_path / "zz" / "seed1"
    assert run_directory(tmp_path, Base, record, 2) == tmp_path / Base.parse([]).config_hash() / "seed2"
    assert run_directory(tmp_path, Behaving, Behaving.parse([]).record(), 1).parent.name == Behaving.parse([]).config_hash()


def test_resolving_twice_changes_nothing_and_every_field_says_what_it_does():
    """So that dataclasses.replace may change an epoch or a seed of a configuration that is resolved."""
    kinds = {ResNetConfig}
    for module in ("rows", "evidence"):
        for program in programs(module):
            for table in program.tables:
                for row in table.rows[:: max(1, len(table.rows) // 12)]:
                    made = program.config(row)
                    kinds.add(type(made))
                    assert replace(made) == made, row.id
                    assert replace(made, seed=7).config_hash() == made.config_hash()
    assert len(kinds) == 9
    for kind in kinds:
        for field in fields(kind):
            if "names" in field.metadata:
                assert field.metadata["options"].get("help"), f"{kind.__name__}.{field.name} has no help"
