"""Rows, the scripts made of them, and the tables and figures made of results."""

import csv
import html.parser
import itertools
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_pretraining.config import PretrainingConfig
from common.experiments.config import Config, config_hash, flag, identity
from common.experiments.files import ROOT, read_json, write_json
from common.tables import plot, rendering
from common.tables.__main__ import main
from common.tables.__main__ import parse as parse_tables
from common.tables.emit import emit, quote
from common.tables.reading import Results, read
from common.tables.rows import (
    Contrast,
    ContrastFigure,
    CurveFigure,
    Program,
    Published,
    Row,
    Table,
    kinds,
    programs,
    select,
)
from common.tables.summaries import contrast_results, summarize
from resnet_cifar.config import ResNetConfig
from resnet_cifar.rows import PROGRAM

KINDS = kinds(programs())


def parse(words):
    """The configuration of a command such as resnet_cifar/train.py --arch resnet20."""
    subproject, script = Path(words[0]).parts[-2:]
    return KINDS[subproject, script].parse(words[1:])


def results_in(directory):
    return Results(read(directory, KINDS)[0], KINDS)


def table_of(id):
    return next(table for table in PROGRAM.tables if table.id == id)


def every_row():
    everything = [*programs(), *programs("evidence")]
    return [(program, table, row) for program in everything for table in program.tables for row in table.rows]


def test_the_settings_of_the_released_code_are_all_here():
    """168 settings, of which the two normalization scripts are three rows each here, and the additions on top."""
    rows = {table.id: [row.id for row in table.rows] for table in PROGRAM.tables}
    controls = [id for id in rows["low-rank"] if "norm-matched" in id]
    assert len(rows["full"]) == 10
    assert len(rows["low-rank"]) - len(controls) == 72
    assert len(rows["overcomplete"]) == 24 + 24 + 24
    assert len(rows["decay-sweep"]) == 12 + 2
    assert len(rows["normalization"]) == 2 * 3
    assert "resnet20-cifar10-0.111-1e-4-regular" in rows["decay-sweep"]


def check_pretraining(args, table, row):
    """A row's name says which products start how, and which of them Frobenius decay covers."""
    if row.script != "train.py":
        assert args.pretraining == PretrainingConfig.parse(row.after.flags).config_hash()
        return
    name = row.id.removesuffix("-phase1")
    spectral = any(word in name for word in ("spectral", "narrow", "both")) or table.id.endswith("strength")
    start = "norm-matched" if "norm-matched" in name else "spectral" if spectral else "regular"
    frobenius = any(word in name for word in ("flambe", "frobenius", "both"))
    for product, init, decayed in (
        ("quekey", args.quekey_init, args.wd2fd_quekey),
        ("outval", args.outval_init, args.wd2fd_outval),
    ):
        if name.endswith(("-quekey", "-outval")):
            assert (init, decayed) == (("spectral", True) if name.endswith(product) else ("regular", False))
        else:
            assert (init, decayed) == (start, frobenius)
    assert (args.spectral_from == "narrow") == name.endswith("narrow")
    assert (args.optimizer == "adamw") == ("adamw" in name)


def test_every_row_parses_and_has_the_flags_it_says():
    for program, table, row in every_row():
        try:
            check_row(program, table, row)
        except AssertionError as error:
            error.add_note(f"row {table.id}/{row.id}")
            raise


def check_row(program, table, row):
    words = program.command(table, row)
    args = parse([*words, "--seed", "1"])
    assert args.row == f"{table.id}/{row.id}"
    assert args.config_hash() == program.config_hash(row) == args.row_config
    if program.name == "transformer_iwslt":
        if table.id.startswith("evidence-"):
            spectral, frobenius, factorized = "spectral" in row.id, "frobenius" in row.id, args.rank_scale > 0
            assert (args.spectral_quekey, args.spectral_outval) == (spectral, spectral)
            assert (args.wd2fd_quekey, args.wd2fd_outval) == (frobenius, frobenius)
            assert (args.init == "spectral", args.wd2fd) == (spectral and factorized, frobenius and factorized)
        else:
            check_translation(args, row)
        return
    if program.name == "bert_pretraining":
        check_pretraining(args, table, row)
        return
    if getattr(args, "init", None) is not None:
        start = next((init for init in ("norm-matched", "spectral", "released") if init in row.id), "regular")
        assert args.init == start
    frobenius = args.decay == "frobenius" if hasattr(args, "decay") else getattr(args, "wd2fd", False)
    assert frobenius == ("frobenius" in row.id)
    assert row.id.endswith(getattr(args, "method", ""))
    assert getattr(args, "square", False) == ("deep-" in row.id)
    undecayed = args.decay == "none" if hasattr(args, "decay") else getattr(args, "no_frob", False)
    assert undecayed == row.id.endswith(("none", "normalized"))
    assert (getattr(args, "normalize", None) is not None) == row.id.endswith("normalized")
    assert str(getattr(args, "decay", "")).endswith("+shortcuts") == row.id.endswith("-shortcuts")
    if table.id in ("decay-sweep", "evidence-decay"):
        assert args.weight_decay == float(re.search(r"\de-\d", row.id)[0])


def check_translation(args, row):
    """Each scheme names the families of products it is applied to: layers, query-key, output-value."""
    scale, decay, method = re.fullmatch(r"([\d.]+)-(0|\de-\d)-(.*)", row.id).groups()
    assert (args.rank_scale, args.weight_decay) == (float(scale), float(decay))
    for scheme, used in (
        ("spectral", (args.init == "spectral", args.spectral_quekey, args.spectral_outval)),
        ("frobenius", (args.wd2fd, args.wd2fd_quekey, args.wd2fd_outval)),
    ):
        families = re.search(rf"{scheme}((?:_\w\w+?)+)(?:\+|$)", method)
        named = families[1].strip("_").split("_") if families else []
        assert named == [family for family, on in zip(("lin", "qk", "ov"), used, strict=True) if on]
    assert args.frobenius_decay == (args.weight_decay if "frobenius" in method else 0)


def test_rows_of_a_table_are_different_configurations():
    for program in [*programs(), *programs("evidence")]:
        for table in program.tables:
            hashes = [program.config_hash(row) for row in table.rows]
            assert len(set(hashes)) == len(hashes), table.id


def test_expected_parameter_counts_are_those_of_a_dry_run(capsys):
    for program, table, row in every_row():
        if table.id in ("quickstart", "normalization") or table.id.startswith("evidence-"):
            if row.parameters is None or row.script != "train.py":
                continue  # known after training, or the non-zeros of a dense network
            if {"--spectral", "--wd2fd", "--init", "--nocrswd", "--decay-shortcuts"} & {*row.flags}:
                continue  # another row differs from it in initialization and decay alone
            classes = ("--num-classes", "10") if "imagefolder" in row.flags else ()
            words = (word for word in row.flags if "{after}" not in word and word != "--normalize")
            import_module(f"{program.name}.train").main(["--dry-run", *classes, *words])
            assert json.loads(capsys.readouterr().out)["parameters"]["compressed"] == row.parameters, row.id


def run_script(script, *words, cwd="/", **environment):
    """Run a script of a folder that is not this project, with its Python and packages."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen(
        ["bash", str(script), *words], env=environment, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def stand_in(path, code):
    """A program that scripts start in place of Python and the real one, which is its first argument."""
    path.write_text(f"#!/usr/bin/env bash\n{code}\n")
    path.chmod(0o755)
    return str(path)


RECORD = 'printf "%s\\0" "$@" >>"$RECORD"; printf "\\n" >>"$RECORD"; echo /tmp/a/result.json'


def recorded(path):
    return [line.rstrip("\0").split("\0") for line in path.read_text().splitlines()]


def test_every_emitted_command_reaches_the_program_as_written(tmp_path):
    """Each script is run by bash with a stand-in for Python that records its arguments; the real parser reads them."""
    emit([*programs(), *programs("evidence")], tmp_path)
    launcher, record = stand_in(tmp_path / "python", RECORD), tmp_path / "record"
    scripts = sorted(tmp_path.glob("*/*/*.sh"))
    assert len(scripts) == len(every_row())
    sample = scripts[:: max(1, len(scripts) // 20)] + list(tmp_path.glob("*/normalization/*-normalized.sh"))
    sample += list(tmp_path.glob("*/pretraining-base-squad/*-norm-matched.sh"))
    for script in sample:
        record.unlink(missing_ok=True)
        done = run_script(script, "4", "7", "--lr", "0.2", LAUNCHER=launcher, RECORD=str(record))
        output, errors = done.communicate()
        assert done.returncode == 0, errors
        assert output == "/tmp/a/result.json\n" * 2
        commands = recorded(record)
        assert all(Path(words[0]).is_file() for words in commands)
        parsed = [parse(words) for words in commands]
        assert {args.seed for args in parsed} == {4, 7}
        assert all(args.lr == 0.2 for args in parsed)
        if "-normalized" in script.name:
            assert [args.dump_frobnorms for args in parsed] == [True, False, True, False]
            assert str(parsed[1].normalize) == "/tmp/a/frobnorms.tensor"
        else:
            rows = [args.row for args in parsed]
            assert rows[-1] == f"{script.parent.name}/{script.stem}"
            assert rows == rows[: len(rows) // 2] * 2
        if script.parent.name == "pretraining-base-squad":
            first = f"pretraining-base/{script.stem}"
            assert rows[:3] == [f"{first}-phase1", first, f"pretraining-base-squad/{script.stem}"]


def test_what_is_changed_in_a_script_takes_effect(tmp_path):
    emit(select(programs(), table="decay-sweep", row="*-5e-6-regular"), tmp_path)
    (script,) = tmp_path.glob("*/*/*.sh")
    launcher, record = stand_in(tmp_path / "python", RECORD), tmp_path / "record"
    subprocess.run(["sed", "-i.bak", "s/--weight-decay 5e-6/--weight-decay 0.25 --spectral/", str(script)], check=True)
    done = run_script(script, "3", LAUNCHER=launcher, RECORD=str(record))
    assert (done.communicate()[1], done.returncode) == ("", 0)
    (words,) = recorded(record)
    assert (parse(words).weight_decay, parse(words).init, parse(words).seed) == (0.25, "spectral", 3)


def test_a_script_runs_this_project_wherever_it_is_called_from(tmp_path):
    """A folder of the same name in the current one is not imported; paths in flags stay relative to the current one."""
    emit(select(programs(), table="quickstart", row="full"), tmp_path / "generated-scripts")
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").write_text("raise SystemExit('the wrong folder')")
    (script,) = tmp_path.glob("generated-scripts/*/*/*.sh")
    (tmp_path / "elsewhere" / "common").mkdir(parents=True)
    (tmp_path / "elsewhere" / "common" / "__init__.py").write_text("raise SystemExit('the wrong folder')")
    script.write_text(script.read_text().replace("root=$(cd", f"root={ROOT} #"))
    flags = ["--max-steps", "1", "--save-dir", "here"]
    done = run_script(script, "1", *flags, cwd=tmp_path / "elsewhere", OMP_NUM_THREADS="1", PYTHONPATH="")
    output, errors = done.communicate()
    assert done.returncode == 0, errors
    assert output == "here/result.json\n"
    assert (tmp_path / "elsewhere" / "here" / "result.json").exists()


def test_a_script_without_an_environment_says_what_to_do(tmp_path):
    emit(select(programs(), table="quickstart", row="full"), tmp_path / "generated-scripts")
    (script,) = tmp_path.glob("generated-scripts/*/*/*.sh")
    done = run_script(script, PYTHON="")
    output, errors = done.communicate()
    assert (done.returncode, output) == (2, "")
    assert errors == f"{script}: error: there is no {tmp_path}/.venv/bin/python: run bash {tmp_path}/setup.sh first\n"


def test_wrong_flags_of_a_script_are_one_line(tmp_path):
    emit(select(programs(), table="quickstart", row="full"), tmp_path / "generated-scripts")
    (script,) = tmp_path.glob("generated-scripts/*/*/*.sh")
    done = run_script(script, "--epochs", "none")
    output, errors = done.communicate()
    assert (done.returncode, output, errors.count("\n")) == (2, "", 1)
    assert "resnet_cifar/train.py: error: argument --epochs" in errors


def test_rows_that_need_the_same_run_wait_for_it(tmp_path):
    """Scripts with one prerequisite, started at once: their runs of it do not overlap."""
    emit(select(programs(), table="table1", row="resnet32x64-cifar10-0.1-*-ob*"), tmp_path / "generated-scripts")
    code = 'if [[ $1 == */train.py ]]; then echo start >>"$RECORD"; sleep 0.5; echo end >>"$RECORD"; fi; echo /a/result.json'
    launcher, record = stand_in(tmp_path / "python", code), tmp_path / "record"
    scripts = sorted(tmp_path.glob("generated-scripts/*/*/*.sh"))
    assert [script.stem.rpartition("-")[2] for script in scripts] == ["obd", "obs"] * 2
    started = [run_script(script, "1", LAUNCHER=launcher, RECORD=str(record)) for script in scripts]
    for each in started:
        assert (each.communicate()[0], each.returncode) == ("/a/result.json\n", 0)
    assert record.read_text().split() == ["start", "end"] * len(started)


def test_lists_leave_out_what_another_row_runs_first(tmp_path):
    emit(programs(), tmp_path)
    lines = (tmp_path / "resnet_cifar" / "normalization.txt").read_text().splitlines()
    assert len(lines) == 2 * 2 * 3
    assert not any("-frobenius.sh" in line for line in lines)


def test_a_script_stops_where_its_first_command_is_told_to_stop(tmp_path):
    emit(programs(), tmp_path)
    launcher = stand_in(tmp_path / "fail", "echo x >>$RECORD; exit 75")
    script = next(tmp_path.glob("*/normalization/*-normalized.sh"))
    done = run_script(script, LAUNCHER=launcher, RECORD=str(tmp_path / "record"))
    done.communicate()
    assert done.returncode == 75
    assert (tmp_path / "record").read_text() == "x\n"


def test_a_script_fails_as_its_program_does_after_all_seeds(tmp_path):
    emit(programs(), tmp_path)
    launcher = stand_in(tmp_path / "fail", "echo x >>$RECORD; exit 3")
    script = next(tmp_path.glob("*/normalization/*-normalized.sh"))
    done = run_script(script, LAUNCHER=launcher, RECORD=str(tmp_path / "record"))
    errors = done.communicate()[1]
    assert done.returncode == 3
    assert (tmp_path / "record").read_text() == "x\n" * 3  # the first command of each seed, never the second
    assert [line for line in errors.splitlines() if line.startswith("failed: ")] == [
        f"failed: normalization/{script.stem} seed {seed}: failed with status 3" for seed in (1, 2, 3)
    ]


@dataclass(kw_only=True)
class OneConfig(Config):
    program: ClassVar[str] = "p"
    epochs: int = flag(1, type=int)


def one_row_program(flags=("--epochs", "2"), id="r", **options):
    table = Table("t", "A title", (Row(id, "a label", tuple(flags), **options),))
    return Program("p", {"train.py": OneConfig}, (table,))


def test_emitting_is_deterministic_and_removes_only_its_own_stale_scripts(tmp_path):
    emit(programs(), tmp_path)
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    emit(programs(), tmp_path)
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before
    emit([one_row_program(id="old")], tmp_path)
    (tmp_path / "p" / "t" / "mine.sh").write_text("echo mine\n")
    (tmp_path / "p" / "t" / "copy.sh").write_text((tmp_path / "p" / "t" / "old.sh").read_text() + "echo mine\n")
    emit([one_row_program(id="new")], tmp_path)
    assert sorted(path.name for path in (tmp_path / "p" / "t").iterdir()) == ["copy.sh", "mine.sh", "new.sh"]
    assert not (tmp_path / "resnet_cifar" / "full.txt").exists()
    index = list(csv.DictReader((tmp_path / "index.csv").open()))
    assert [line["row"] for line in index] == ["new"]


def test_emitting_takes_no_torch_and_little_time(tmp_path):
    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = (
        "import sys, common.tables.emit as e, common.tables.rows as r, pathlib; "
        "e.emit([*r.programs(), *r.programs('evidence')], pathlib.Path(sys.argv[1]))"
    )
    check = f"{code}; sys.exit('torch' in sys.modules)"
    subprocess.run([ROOT / ".venv/bin/python", "-c", check, str(tmp_path)], cwd=ROOT, check=True)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.ru_utime - started.ru_utime < 6  # seconds of a processor; 2 if nothing else runs


HOSTILE = st.text(st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(HOSTILE | st.sampled_from(["$(touch pwned)", "`id`", "'; rm x; '", "a b", "*", "~", "-n", "\\", '"$HOME"', "\n"]))
)
def test_any_words_survive_the_shell(words):
    code = f'words={quote(words)}; printf %s "$words"'
    printed = subprocess.run(["bash", "-c", code], capture_output=True, check=True).stdout.decode()
    assert parse_tables(["run", "t/r", "--seeds", "1", f"--command={printed}"]).commands == [tuple(words)]


def test_labels_cannot_leave_their_comment(tmp_path):
    emit([one_row_program(published=Published(1.0, "a\ntouch pwned"))], tmp_path)
    script = (tmp_path / "p" / "t" / "r.sh").read_text()
    assert not any(line.startswith("touch") for line in script.splitlines())


@pytest.mark.parametrize("id", ["", "a/b", "../x", "a b", ".hidden", "-flag", "$x", "ä"])
def test_unsafe_ids_are_refused(id):
    with pytest.raises(ValueError, match="safe file name"):
        Row(id, "label", ())
    with pytest.raises(ValueError, match="safe file name"):
        Table(id, "title", ())


def test_wrong_flags_name_the_row(capsys):
    for flags in (["--lr", "1"], ("--lr", 1), "--lr 1"):
        with pytest.raises(ValueError, match="the flags of row 'r' must be a tuple of words"):
            Row("r", "label", flags)
    with pytest.raises(ValueError, match=r"row 'r' of resnet_cifar has wrong flags: --rank-scales 0\.1"):
        PROGRAM.config(Row("r", "label", ("--rank-scales", "0.1")))
    assert "unrecognized arguments" in capsys.readouterr().err


def test_selecting_rows():
    (program,) = select(programs(), table="decay-sweep", row="*-5e-6-*")
    assert [row.id for row in program.tables[0].rows] == [f"resnet20-cifar10-0.111-5e-6-{m}" for m in ("regular", "frobenius")]
    (program,) = select(programs(), row="decay-sweep/*")
    assert program.tables[0].rows == table_of("decay-sweep").rows
    for choice, message in (
        ({"table": "x"}, "there is no table 'x'"),
        ({"program": "x"}, "there is no program 'x'"),
        ({"row": "x*"}, "no row matches 'x\\*'"),
    ):
        with pytest.raises(ValueError, match=message):
            select(programs(), **choice)


counter = itertools.count()


def write_result(directory, row_id="r", table="quickstart", *, seed=1, final=90.0, change=None, **fields):
    """A result as a program writes it, of a real row of the ResNet program."""
    row = next(row for row in table_of(table).rows if row.id == row_id)
    config = PROGRAM.record(row) | (change or {})
    path = directory / f"run{next(counter)}" / "result.json"
    content = {
        "format": 2,
        "status": "finished",
        "row": f"{table}/{row_id}",
        "script": "train.py",
        "config": config,
        "config_hash": config_hash(identity(ResNetConfig, config)),
        "seed": seed,
        "metrics": {"final": final, "best": final + 1},
        "parameters": {"original": 100, "compressed": 25, "ratio": 0.25},
        "seconds": 10.0,
    }
    write_json(path, content | fields)
    return path


def test_tables_show_mean_deviation_and_count(tmp_path):
    for seed, final in ((1, 90.0), (2, 92.0), (3, 94.0)):
        write_result(tmp_path, "spectral", seed=seed, final=final)
    write_result(tmp_path, "full", final=96.5)
    results, problems = read(tmp_path, KINDS)
    assert problems == []
    table = table_of("quickstart")
    lines = {line.row: line for line in summarize(PROGRAM, table, Results(results, KINDS))}
    spectral = lines["spectral"]
    assert (spectral.n, spectral.final_mean, spectral.final_std, spectral.best_mean) == (3, 92.0, 2.0, 93.0)
    assert (lines["full"].n, lines["full"].final_std) == (1, None)
    assert (lines["regular"].n, lines["regular"].final_mean) == (0, None)
    markdown = rendering.to_markdown(table, list(lines.values()))
    assert "92.00 ± 2.00" in markdown
    assert "n/a" in markdown
    latex = rendering.to_latex(table, list(lines.values()))
    assert r"92.00 $\pm$ 2.00" in latex
    rendering.write(table, list(lines.values()), tmp_path / "out")
    header, *_ = (tmp_path / "out" / "table.csv").read_text().splitlines()
    assert {"row", "n", "parameters", "final_mean", "final_std", "best_mean", "seconds"} <= set(header.split(","))


def test_only_results_of_exactly_the_row_count(tmp_path):
    write_result(tmp_path, "spectral", final=10.0, change={"epochs": 1}, row=None)
    assert all(line.n == 0 for line in summarize(PROGRAM, table_of("quickstart"), results_in(tmp_path)))


def test_the_same_seed_twice_counts_once(tmp_path):
    write_result(tmp_path, "spectral")
    write_result(tmp_path, "spectral")
    assert [line.n for line in summarize(PROGRAM, table_of("quickstart"), results_in(tmp_path)) if line.n] == [1]


def test_mixed_configurations_of_one_row_and_seed_stop_the_table(tmp_path):
    first = write_result(tmp_path, "spectral")
    second = write_result(tmp_path, "spectral", change={"epochs": 1})
    results = results_in(tmp_path)
    with pytest.raises(ValueError, match="different configurations") as error:
        results.check(PROGRAM, table_of("quickstart"))
    results.check(PROGRAM, PROGRAM.tables[0])  # other tables stand
    assert str(first) in str(error.value)
    assert str(second) in str(error.value)


def test_results_of_an_older_configuration_are_named_and_conflicts_stop_only_their_table(tmp_path, capsys):
    write_result(tmp_path, "full", final=96.0)
    write_result(tmp_path, "spectral", seed=2, change={"epochs": 1})
    main(["collect", "--results", str(tmp_path)])
    assert "is recorded as row quickstart/spectral but has another configuration" in capsys.readouterr().err
    write_result(tmp_path, "resnet20-cifar10-full", "full")
    write_result(tmp_path, "spectral", seed=2)
    with pytest.raises(SystemExit):
        main(["collect", "--html", "--results", str(tmp_path)])
    output = capsys.readouterr()
    assert "Full networks" in output.out
    assert "different configurations" in output.err
    assert (tmp_path / "index.html").exists()


def test_results_made_from_different_files_are_not_mixed(tmp_path):
    write_result(tmp_path, "spectral", inputs={"normalize": "a"})
    write_result(tmp_path, "spectral", inputs={"normalize": "b"})
    results = results_in(tmp_path)
    with pytest.raises(ValueError, match="made from different files"):
        results.check(PROGRAM, table_of("quickstart"))
    results.check(PROGRAM, table_of("low-rank"))  # which does not count them


def test_the_papers_shape_has_a_line_per_scheme(tmp_path):
    write_result(tmp_path, "resnet32-cifar10-0.111-spectral", "low-rank", final=92.5)
    table = table_of("low-rank")
    lines = summarize(PROGRAM, table, results_in(tmp_path))
    text = rendering.arranged_as_published(table, lines)
    assert len(text.splitlines()) == 2 + 3 * 6 + 1
    (line,) = [line for line in text.splitlines() if line.startswith("| 0.111 spectral ")]
    assert "92.50 (n=1); n/a" in line


def test_bad_results_are_named_and_not_counted(tmp_path, capsys):
    write_result(tmp_path, "spectral")
    bad = [
        (write_result(tmp_path, "full", format=0), "is not a result in a format that this version reads"),
        (write_result(tmp_path, "full", script="other.py"), "resnet_cifar/other.py, which is not a program of this version"),
        (write_result(tmp_path, "full", status="running"), "is not finished"),
        (write_result(tmp_path, "full", metrics={"final": 1.0}), "has a missing or invalid field"),
        (write_result(tmp_path, "full", config_hash="0"), "does not match its hash"),
        (write_result(tmp_path, "full", seed="2"), "has a missing or invalid field"),
        (write_result(tmp_path, "full", row=5), "has a missing or invalid field"),
        (write_result(tmp_path, "full", seconds=None), "has a missing or invalid field"),
        (write_result(tmp_path, "full", parameters={}), "has a missing or invalid field"),
    ]
    nan = write_result(tmp_path, "full", final=1.0)
    nan.write_text(nan.read_text().replace('"final": 1.0', '"final": NaN'))
    bad.append((nan, "not finite"))
    half = tmp_path / "half" / "result.json"
    half.parent.mkdir()
    half.write_text('{"format": 1, "sta')
    bad.append((half, "is not a JSON file"))
    results, problems = read(tmp_path, KINDS)
    assert len(results) == 1
    for path, message in bad:
        assert any(str(path) in problem and message in problem for problem in problems), message


def with_curves(path, values):
    records = [{"epoch": epoch, "test_accuracy": value, "frobenius_norm": 9 - epoch} for epoch, value in enumerate(values)]
    path.with_name("metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_results_that_were_kept_without_their_metrics_have_tables_and_no_curves(tmp_path, capsys):
    write_result(tmp_path, "spectral")
    main(["plot", "--results", str(tmp_path)])
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "nothing to plot for quickstart: none of its figures has results yet\n")
    with pytest.raises(SystemExit):
        main(["collect", "--row", "full", "--results", str(tmp_path)])
    assert "the finished runs there (1) are of other rows or of none" in capsys.readouterr().err
    main(["collect", "--html", "--results", str(tmp_path)])
    assert "90.00" in capsys.readouterr().out
    assert list((tmp_path / "quickstart").glob("*.png")) == []


def test_collect_prints_and_writes_tables_and_figures(tmp_path, capsys):
    for seed in (1, 2):
        with_curves(write_result(tmp_path, "spectral", seed=seed), [10, 50, 90 + seed])
    main(["collect", "--table", "quickstart", "--results", str(tmp_path)])
    assert "Quickstart" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "quickstart").iterdir()}
    assert written == {"table.md", "table.csv", "table.tex"}
    main(["plot", "--results", str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "quickstart" / "curves.png")
    assert {"curves.png", "curves.pdf"} <= {path.name for path in (tmp_path / "quickstart").iterdir()}


def test_collect_names_the_runs_that_belong_to_no_row(tmp_path, capsys):
    write_result(tmp_path, "spectral")
    changed = write_result(tmp_path, "spectral", row=None, change={"lr": 0.3})
    outdated = write_result(tmp_path, "regular", change={"lr": 0.3})
    lines = {
        f"in no table: {changed} belongs to no row; common.tables compare shows it",
        f"not counted in quickstart: {outdated} is recorded as row quickstart/regular but has another configuration",
    }
    main(["collect", "--results", str(tmp_path)])
    said = capsys.readouterr().err.splitlines()
    assert (set(said), len(said)) == (lines, 2)
    main(["collect", "--results", str(tmp_path), "--table", "quickstart"])
    assert "in no table" not in capsys.readouterr().err


def test_contrasts_are_paired_over_the_seeds_that_both_rows_have(tmp_path):
    """Against Student's distribution with two degrees of freedom, whose tail and quantile have a closed form."""
    finals = {"full": [95.0, 96.0, 98.0, 90.0], "spectral": [90.0, 92.0, 91.0], "regular": [80.0], "frobenius": [64.99, 63.99]}
    for id, values in finals.items():
        for seed, final in enumerate(values, 1):
            write_result(tmp_path, id, seed=seed + (1 if id == "frobenius" else 0), final=final)
    table = table_of("quickstart")
    pairs = [("spectral", "full"), ("spectral", "regular"), ("frobenius", "spectral"), ("frobenius", "regular")]
    table = replace(table, contrasts=tuple(Contrast("which?", *pair) for pair in pairs), figures=(ContrastFigure(),))
    results = results_in(tmp_path)
    three, one, same, none = contrast_results(PROGRAM, table, results)
    assert three[1] == [-5, -4, -7]
    mean, error = -16 / 3, math.sqrt(7 / 9)  # sample variance 7/3, over three
    t, quantile = mean / error, math.sqrt(2 * 0.95**2 / (1 - 0.95**2))
    found = three[0]
    assert (found.n, found.mean) == (3, pytest.approx(mean))
    assert found.p == pytest.approx(1 - abs(t) / math.sqrt(2 + t * t), rel=1e-5)
    assert found.low == pytest.approx(mean - quantile * error, rel=1e-5)
    assert found.high == pytest.approx(mean + quantile * error, rel=1e-5)
    assert (one[0].n, one[0].mean, one[0].p, one[0].low) == (1, 10, None, None)
    assert 64.99 - 92.0 != 63.99 - 91.0  # equal to the reader, not in binary
    assert (same[0].n, same[0].mean, same[0].p) == (2, -27.01, None)
    assert (none[0].n, none[0].mean) == (0, None)
    text = rendering.to_markdown(table, summarize(PROGRAM, table, results), [found, none[0]])
    assert "spectral - full" in rendering.to_latex(table, summarize(PROGRAM, table, results), [found])
    (line,) = [line.replace(" ", "") for line in text.splitlines() if "spectral - full" in line]
    assert line == f"|which?|spectral-full|3|-5.33|[{found.low:+.2f},{found.high:+.2f}]|{found.p:.3f}|"
    rendering.write(table, summarize(PROGRAM, table, results), tmp_path / "out", [three[0]])
    assert (tmp_path / "out" / "contrasts.csv").read_text().splitlines()[0] == "question,row,base,n,mean,low,high,p"
    axes = plot.contrasts(PROGRAM, table, results).axes[0]
    assert len(axes.get_yticks()) == 3
    assert plot.contrasts(PROGRAM, table, Results([], KINDS)) is None
    with pytest.raises(ValueError, match="names row 'nothing', which it does not have"):
        replace(table, contrasts=(Contrast("which?", "nothing", "full"),))


def test_a_program_may_count_no_other_seeds_than_its_rows_name(tmp_path):
    for seed in (1, 2, 9):
        write_result(tmp_path, "full", seed=seed, final=90.0 + seed)
    results = results_in(tmp_path)
    table = table_of("quickstart")
    assert summarize(PROGRAM, table, results)[0].n == 3
    assert summarize(replace(PROGRAM, own_seeds=True), table, results)[0].n == 2


@pytest.mark.parametrize("name", ["test", "dev", "data", "data/anaphora.jsonl"])
def test_a_table_of_runs_on_different_data_is_refused(tmp_path, name):
    write_result(tmp_path, "full", inputs={"train": "a", name: "b"})
    write_result(tmp_path, "regular", inputs={"train": "a", name: "c"})
    with pytest.raises(ValueError, match="has runs on different data"):
        results_in(tmp_path).check(PROGRAM, table_of("quickstart"))


def test_reducing_a_table_keeps_the_contrasts_between_its_rows():
    (program,) = select(programs("evidence"), program="resnet_cifar", row="evidence-schemes/spectral*")
    assert [(c.row, c.base) for c in program.tables[0].contrasts] == [("spectral+frobenius", "spectral")]


def test_the_committed_evidence_makes_its_tables_and_figures(tmp_path, capsys):
    """Tables to the byte; figures by name, for their pixels depend on the version of matplotlib."""
    main(["collect", "--evidence", "--out", str(tmp_path)])
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert made == sorted(path.relative_to(ROOT / "evidence") for path in (ROOT / "evidence").glob("evidence-*/*"))
    assert made
    for path in made:
        if path.suffix in (".md", ".csv", ".tex"):
            assert (tmp_path / path).read_bytes() == (ROOT / "evidence" / path).read_bytes(), path


def test_accuracy_against_a_setting(tmp_path):
    for decay in ("5e-6", "1e-4", "5e-3"):
        for method in ("regular", "frobenius"):
            write_result(tmp_path, f"resnet20-cifar10-0.111-{decay}-{method}", "decay-sweep")
    table = table_of("decay-sweep")
    drawn = plot.sweep(table.figures[0], PROGRAM, table, results_in(tmp_path))
    (axes,) = drawn.axes
    names = set(axes.get_legend_handles_labels()[1])
    assert names == {"regular, weight decay", "regular, Frobenius decay"}


def test_legends_stay_within_their_figures():
    (program,) = select(programs("evidence"), program="resnet_cifar")
    results = results_in(ROOT / "evidence")
    drawn = [
        (plot.curves if isinstance(figure, CurveFigure) else plot.sweep)(figure, program, table, results)
        for table in program.tables
        for figure in table.figures
        if not isinstance(figure, ContrastFigure)
    ]
    drawn = [each for each in drawn if each is not None]  # tables for a GPU have no results yet
    assert len(drawn) == 5
    for each in drawn:
        each.draw_without_rendering()
        box = each.legends[0].get_window_extent()
        assert 0 <= box.x0 < box.x1 <= each.bbox.width


def test_errors_of_the_command_are_one_line(capsys, tmp_path):
    for words in (
        ["status", "--results", str(tmp_path / "x")],
        ["list", "--row", "nothing*"],
        ["collect", "--table", "nothing"],
        ["explode"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def write_run(directory, row_id, seed, status=None, table="quickstart", **progress):
    """The files of a run that has begun."""
    row = next(row for t in PROGRAM.tables if t.id == table for row in t.rows if row.id == row_id)
    path = directory / f"run{next(counter)}"
    write_json(path / "config.json", {**PROGRAM.record(row), "seed": seed})
    if status is not None:
        write_json(path / "status.json", {"status": status, "time": time.time()} | progress)


def test_status_counts_each_seed_once_and_says_why_runs_failed(tmp_path, capsys):
    result = write_result(tmp_path, "full", seed=1)
    write_json(result.with_name("config.json"), {**json.loads(result.read_text())["config"], "seed": 1})
    write_run(tmp_path, "full", 1, "running", step=1, steps=10)  # the finished one counts
    write_run(tmp_path, "full", 2, "running", step=5, steps=10)
    write_run(tmp_path, "full", 3, "failed", error="RuntimeError: loss is nan")
    write_run(tmp_path, "spectral", 1, "stopped", step=5, steps=10)
    write_run(tmp_path, "spectral", 2, "running", time=time.time() - 3600, step=5, steps=10)
    write_run(tmp_path, "resnet20-cifar10-0.111-5e-6-regular", 1, "running", "decay-sweep", step=3, steps=4)
    write_run(tmp_path, "resnet20-cifar10-0.111-5e-6-regular", 2, "running", "decay-sweep", step=4000)  # of unknown length
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("[]")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{")
    main(["status", "--results", str(tmp_path), "--table", "quickstart"])
    output = capsys.readouterr()
    printed = output.out
    assert f"not read: {tmp_path}/half/config.json is not a JSON file" in output.err
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith("quickstart/")}
    assert lines["quickstart/full"] == ["1", "1", "1", "0.0"]
    assert lines["quickstart/spectral"] == ["1", "1", "1", "0.0"]
    assert "failed: quickstart/full seed 3: RuntimeError: loss is nan" in printed
    assert "seed 2: no heartbeat" in printed
    rows = len(table_of("quickstart").rows)
    assert f"{rows} rows ({rows - 2} rows have not started and are not shown; --all shows them)" in printed
    main(["status", "--results", str(tmp_path), "--table", "decay-sweep", "--row", "*-5e-6-regular"])
    assert f"{50 / 60 * 2.25:.1f} GPU-hours left" in capsys.readouterr().out


def test_status_counts_a_result_that_was_kept_alone(tmp_path, capsys):
    write_result(tmp_path, "full", seed=1)
    main(["status", "--results", str(tmp_path), "--table", "quickstart"])
    (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("quickstart/full")]
    assert line[1:3] == ["1", "2"]  # finished, missing


def test_the_page_stands_alone_and_escapes(tmp_path, capsys):
    for seed in (1, 2):
        with_curves(write_result(tmp_path, "spectral", seed=seed), [10, 90 + seed])
    (tmp_path / "<b>").mkdir()
    (tmp_path / "<b>" / "result.json").write_text("{")
    main(["collect", "--html", "--results", str(tmp_path)])
    page = (tmp_path / "index.html").read_text()
    assert "92.00" not in page
    assert "90.00 ± 0.00" in page
    assert page.count("<img ") == 1
    assert not re.search(r'(src|href)="(https?:|//)', page)
    assert "<b>" not in page
    for target in re.findall(r'href="([^#"]+)"', page):
        assert target.endswith((".sh", "result.json"))
    html.parser.HTMLParser().feed(page)


def test_the_machinery_is_fast_enough(tmp_path):
    """600 scripts under 2 seconds and 2,000 results under 5 (benchmarks/tables.py), with room for a slow machine."""
    from benchmarks.tables import program, write_results

    made = program()
    started = time.perf_counter()
    emit([made], tmp_path / "scripts")
    emitted = time.perf_counter() - started
    write_results(made, tmp_path / "results")
    started = time.perf_counter()
    results = results_in(tmp_path / "results")
    lines = [line for table in made.tables for line in summarize(made, table, results)]
    collected = time.perf_counter() - started
    assert sum(line.n for line in lines) == 2000
    assert emitted < 6
    assert collected < 6


@pytest.mark.parametrize("program", programs(), ids=lambda program: program.name)
def test_a_row_of_each_program_runs_for_two_steps(program, tmp_path):
    emit([program], tmp_path / "generated-scripts")
    script = tmp_path / "generated-scripts" / program.name / program.tables[0].id / f"{program.tables[0].rows[0].id}.sh"
    small = {"tensor_wrn": "--wrn-depth 10 --wrn-width 1", "compression_baselines": "--depth 8"}.get(program.name, "")
    embedded = f"--data digits --image-size 32 --batch-size 8 {small}"
    if program.name == "transformer_iwslt":
        embedded = "--embed-dim 16 --ffn-dim 16 --max-tokens 400"
        pytest.importorskip("fairseq", reason="its wheel is for Linux x86_64")
        from transformer_iwslt.prepare import main as prepare

        prepare(["--corpus", "numbers", "--size", "300", "--dest", str(tmp_path / program.tables[0].rows[0].flags[0])])
    if program.name == "bert_pretraining":
        embedded = "--layers 1 --embed-dim 16 --heads 2 --batch-size 8 --update-freq 2 --amp off"
        from bert_pretraining.prepare import main as prepare

        prepare(["--corpus", "numbers", "--lines", "3000", "--dest", str(tmp_path / program.tables[0].rows[0].flags[0])])
    flags = ["1", *embedded.split(), "--max-steps", "2", "--save-dir", str(tmp_path / "run")]
    done = run_script(script, *flags, cwd=tmp_path, **{**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    output, errors = done.communicate()
    assert done.returncode == 0, errors
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert output.strip() == str(tmp_path / "run" / "result.json")
    assert (result["config"]["max_steps"], result["row"], result["seed"]) == (2, None, 1)


def test_comparing_runs_shows_what_was_measured(tmp_path, capsys):
    write_result(tmp_path, "full", seed=1, final=91.0)
    write_result(tmp_path, "spectral", seed=1, final=90.0)
    one, other = sorted(tmp_path.glob("run*"))
    at = {"multiply_adds": 2_500_000, "latency": 0.004}
    cost = {"parameters": 100, "nonzero": 40, "batch1": at, "batch128": at}
    write_json(other / "measure.json", {"models": {"as trained": cost}})
    main(["compare", str(one), str(other)])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [line[2] for line in lines[2:]] == ["91.00", "90.00"]
    assert [line[6] for line in lines[2:]] == ["-", "2.5"]
    assert lines[3][4:6] == ["100", "40"]
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "nothing")])
    assert "has no result.json: it is not a finished run" in capsys.readouterr().err


def test_the_evidence_page_names_the_signature_of_its_bleu():
    page = (ROOT / "evidence" / "README.md").read_text()
    runs = sorted((ROOT / "evidence" / "transformer_iwslt" / "evidence-multi30k").glob("*/*/*/result.json"))
    assert runs
    assert {read_json(path)["metrics"]["sacrebleu_signature"] in page for path in runs} == {True}
