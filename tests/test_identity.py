"""The identity of configurations: it ties results to rows, and fields that come later must not orphan results."""

import json
from collections import Counter
from dataclasses import make_dataclass, replace

import pytest

from common.experiments.config import config_hash, flag
from common.experiments.files import ROOT, read_json, write_json
from common.experiments.results import RunResult
from common.tables.reading import Results, read
from common.tables.rows import keys, kinds, programs, select
from common.tables.summaries import summarize
from resnet_cifar.rows import PROGRAM

EVIDENCE = ROOT / "evidence"
# Identities of rows of every program and script.
PINNED = {
    "full/resnet110-cifar100-full": "baf1b40d5d93",
    "low-rank/resnet32-cifar10-0.111-spectral+frobenius": "d7a04bfdf60d",
    "overcomplete/resnet56-cifar10-deep-frobenius": "7658c1b48ee6",
    "normalization/resnet20-cifar10-0.111-spectral-normalized": "05e4121932f5",
    "quickstart/norm-matched": "3ac9b4ecb51f",
    "table1/resnet32x64-cifar10-full": "9a3a010dbfd0",
    "table1/vgg19-tiny_imagenet-0.05-spectral": "52332625ac83",
    "table1/resnet32x64-cifar10-0.1-eigendamage": "7ddf3a53d1c8",
    "table1/vgg19-cifar100-0.02-rigl": "846ac59088ae",
    "table1-width32/resnet32x32-cifar10-0.1-lottery": "7792802c029a",
    "table2/full": "0abce5e6d3e6",
    "table2/Tucker-0.06667-spectral-frobenius": "a5f9856bf72f",
    "table2-controls/TensorTrain-0.234-released-none": "15c65c3894a7",
    "iwslt14-0/0-0-regular": "1fbb896a3523",
    "iwslt14-0.5/0.5-1e-4-spectral_lin_qk_ov+frobenius_lin_qk_ov": "59a7da9d735b",
    "pretraining-base/0.5-flambe-spectral-phase1": "ab57fd343227",
    "pretraining-base/0.5-flambe-spectral": "387ce240a31a",
    "pretraining-large/adamw-full": "fc640353cf61",
    "pretraining-base-squad/1-lamb-regular": "f820b23c7e00",
    "pretraining-mini/0.5-flambe-narrow": "2fe1b14cee5a",
    "quickstart-pretraining/both": "22a6a0b038f3",
    "evidence-schemes/spectral+frobenius": "019d8bb792c4",
    "evidence-table1/0.02-magnitude": "5b0296b4ffc9",
    "evidence-table2-released/Conv-spectral-crs-shortcuts": "a8492ae0bcb9",
    "evidence-multi30k/0.25-spectral+frobenius": "d2ff9e1878a1",
    "evidence-multi30k/0.5-frobenius": "4985cabdaaec",
    "evidence-paper-decay/spectral+frobenius": "1331507cc99a",
    "evidence-table1-5e-4/spectral+frobenius": "b7624d42c940",
    "evidence-pretraining/spectral+frobenius": "a72b94971be2",
    "evidence-pretraining-sst2/spectral": "fca1144a7fc4",
    "evidence-pretraining-blimp/norm-matched": "03b0e141c8c8",
}
# Committed runs that each table of the evidence counts; a configuration that stands in two tables counts in both.
COUNTED = {
    "evidence-schedule": 4,
    "evidence-schemes": 27,
    "evidence-normalization": 6,
    "evidence-decay": 8,
    "evidence-rank": 9,
    "evidence-overcomplete": 7,
    "evidence-table1-schedule": 4,
    "evidence-table1": 20,
    "evidence-table1-weaker": 4,
    "evidence-table1-5e-4": 15,
    "evidence-table2-schedule": 5,
    "evidence-table2": 34,
    "evidence-table2-stronger": 9,
    "evidence-table2-weaker": 4,
    "evidence-table2-released": 21,
    "evidence-multi30k": 22,
    "evidence-paper-decay": 15,
    "evidence-paper-schedule": 0,  # for a GPU
    "evidence-paper-table1": 0,
    "evidence-pretraining-strength": 6,
    "evidence-pretraining-positions": 2,
    "evidence-pretraining": 12,
    "evidence-pretraining-blimp": 12,
    "evidence-pretraining-sst2": 10,
}


def every_row(found):
    return {f"{table.id}/{row.id}": (program, row) for program in found for table in program.tables for row in table.rows}


def counted(found, known):
    results = Results(read(EVIDENCE, known)[0], known)
    return {table.id: sum(each.n for each in summarize(p, table, results)) for p in found for table in p.tables}


def extended(program, **fields):
    """The program with more fields in the configurations of all its scripts."""
    made = {
        script: make_dataclass(
            kind.__name__, [(name, object, value()) for name, value in fields.items()], bases=(kind,), kw_only=True
        )
        for script, kind in program.configs.items()
    }
    return replace(program, configs=made)


def test_identities_of_rows_stay():
    rows = every_row([*programs(), *programs("evidence")])
    changed = {name: rows[name][0].config_hash(rows[name][1]) for name in PINNED}
    changed = {name: found for name, found in changed.items() if found != PINNED[name]}
    assert not changed, (
        f"the identity of rows has changed, which orphans the results that people have: {changed}. "
        "A new field needs the value that runs had without it: flag(..., before=VALUE), or a default that changes nothing. "
        "Where results do change, put the new identities here and say so in CHANGELOG.md"
    )


def test_what_runs_did_before_their_fields_existed_stays():
    """Rows do not show it: where a default changes without ``before``, those that leave the flag out keep their identity."""
    for name, pinned in read_json(ROOT / "tests" / "before.json").items():
        before = kinds(programs())[tuple(name.split("/"))].before()
        changed = {field: before.get(field) for field, value in pinned.items() if before.get(field, ...) != value}
        assert not changed, (
            f"{name}: results that people have would be read with other values of {changed}. "
            "Where a default changes, give the old one as before: flag(NEW, ..., before=OLD)"
        )


def test_every_committed_result_counts():
    """For one row of the table that it names, through the configuration that it stores. Some rows have another name now."""
    known, rows = kinds(programs()), every_row(programs("evidence"))
    results, problems = read(EVIDENCE, known)
    assert problems == []
    assert len(results) == len(list(EVIDENCE.rglob("result.json"))) == 239
    for result in results:
        found = set(keys(result.config, known, result.script))
        of_table = [each for name, each in rows.items() if name.startswith(f"{result.row.partition('/')[0]}/")]
        (row,) = [row for program, row in of_table if program.key(row) in found]
        assert result.seed in row.seeds, result.path
    assert counted(programs("evidence"), known) == COUNTED
    files = Counter(path.relative_to(EVIDENCE).parts[1] for path in EVIDENCE.rglob("result.json"))
    shared = {"evidence-decay": 1, "evidence-rank": 2, "evidence-table2-weaker": 2, "evidence-table2-released": 12}
    assert {id: n - shared.get(id, 0) for id, n in COUNTED.items() if n} == files


def test_a_field_that_changes_nothing_by_default_changes_no_identity():
    found = [*programs(), *programs("evidence")]
    grown = [extended(program, inert=lambda: flag(False)) for program in found]
    for program, larger in zip(found, grown, strict=True):
        for table in program.tables:
            for row in table.rows:
                assert larger.record(row) == {**program.record(row), "inert": False}
                assert larger.config_hash(row) == program.config_hash(row)
    assert counted([program for program in grown if program.own_seeds], kinds(grown)) == COUNTED


def test_a_field_with_a_new_default_makes_new_rows_and_old_results_count_for_the_old_value():
    (program,) = select(programs("evidence"), table="evidence-schemes")
    larger = extended(program, zero=lambda: flag("none", choices=("default", "none"), before="default"))
    known = kinds([larger])
    assert counted([larger], known) == {"evidence-schemes": 0}
    (table,) = larger.tables
    old = replace(table, rows=tuple(replace(row, flags=(*row.flags, "--zero", "default")) for row in table.rows))
    assert counted([replace(larger, tables=(old,))], known) == {"evidence-schemes": 27}
    for row, named in zip(table.rows, old.rows, strict=True):
        assert larger.config_hash(named) == program.config_hash(row) != larger.config_hash(row)


def result_of_format_2(path):
    row = PROGRAM.tables[0].rows[0]
    RunResult(
        row=None,
        script="train.py",
        config=PROGRAM.record(row),
        config_hash=PROGRAM.config_hash(row),
        seed=1,
        metrics={"final": 1.0, "best": 2.0},
        parameters={"original": 2, "compressed": 1, "ratio": 0.5},
        seconds=1.0,
    ).save(path)
    return path


def test_the_hash_of_format_1_is_that_of_the_whole_configuration(tmp_path):
    source = next(EVIDENCE.rglob("result.json"))
    content = read_json(source)
    assert content["format"] == 1
    assert content["config_hash"] == config_hash(content["config"])
    path = tmp_path / "result.json"
    write_json(path, content)
    assert read(tmp_path, kinds(programs()))[1] == []
    content["config"]["lr"] = 0.5
    write_json(path, content)
    (problem,) = read(tmp_path, kinds(programs()))[1]
    assert problem == f"{path} has a configuration that does not match its hash"


def test_the_hash_of_format_2_is_that_of_the_identity(tmp_path):
    path = result_of_format_2(tmp_path / "result.json")
    known = kinds(programs())
    (result,) = read(tmp_path, known)[0]
    assert result.config_hash != config_hash(result.config)
    larger = kinds([extended(program, inert=lambda: flag(False)) for program in programs()])
    assert read(tmp_path, larger)[1] == []
    content = json.loads(path.read_text())
    write_json(path, {**content, "config": {**content["config"], "lr": 0.5}})
    (problem,) = read(tmp_path, known)[1]
    assert problem.startswith(f"{path} has a configuration that does not match its hash: the file was edited")
    write_json(path, {**content, "config": {**content["config"], "new": True, "other": 1}})
    (problem,) = read(tmp_path, known)[1]
    assert problem == f"{path} comes from another version: it has the unknown fields new, other"
    write_json(path, {**content, "script": "prune.py"})
    (problem,) = read(tmp_path, known)[1]
    assert problem == f"{path} is a result of resnet_cifar/prune.py, which is not a program of this version"


@pytest.mark.parametrize(
    "change",
    [
        {"script": ["x"]}, {"config": {"program": ["x"]}}, {"config": []}, {"inputs": None}, {"metrics": None},
        {"metrics": {"final": 10**400, "best": 1}}, {"parameters": {"compressed": float("inf"), "ratio": 1}}, {"seed": "1"},
    ],
)  # fmt: skip
def test_garbled_results_are_problems_and_no_more(tmp_path, change):
    path = result_of_format_2(tmp_path / "a" / "result.json")
    result_of_format_2(tmp_path / "b" / "result.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    found, (problem,) = read(tmp_path, kinds(programs()))
    assert len(found) == 1
    assert problem.startswith(str(path))


@pytest.mark.parametrize(("script", "count"), [("prune.py", 2), ("sparse.py", 8)])
def test_results_of_one_script_do_not_count_for_another(script, count):
    """Though format 1 does not tell the script."""
    known = kinds(programs())
    rows = every_row(programs("evidence")).values()
    ours = {program.key(row) for program, row in rows if row.script == script}
    others = {program.key(row) for program, row in rows if row.script != script}
    found = [set(keys(result.config, known)) for result in read(EVIDENCE, known)[0]]
    assert sum(not ours.isdisjoint(each) for each in found) == count  # EigenDamage, or four sparse methods, at two budgets
    assert not any(ours & each and others & each for each in found)
