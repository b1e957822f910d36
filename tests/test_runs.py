"""Flags, identity, directories and records of runs."""

import json

import pytest

from common.experiments.config import FlagParser, config_hash
from common.experiments.files import digest, read_json, write_atomic
from common.experiments.runs import Run


def test_flags_take_dashes_and_underscores_and_no_abbreviations(capsys):
    parser = FlagParser(prog="p")
    parser.add_argument("--rank-scale", type=float)
    assert parser.parse_args(["--rank_scale", "0.1"]).rank_scale == 0.1
    assert parser.parse_args(["--rank_scale=0.1"]).rank_scale == 0.1
    for bad in (["--rank", "1"], ["--rank-scale", "x"], ["--other_flag"]):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(bad)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_hash_is_of_the_content():
    assert config_hash({"a": 1, "b": [2]}) == config_hash({"b": [2], "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})


def test_the_digest_of_a_folder_sees_through_links(tmp_path):
    """A class may be a link to a folder of images elsewhere; image folders are read through such links too."""
    images, linked = tmp_path / "images" / "ant", tmp_path / "linked"
    images.mkdir(parents=True)
    linked.mkdir()
    (images / "0.png").write_bytes(b"image")
    (linked / "ant").symlink_to(images)
    assert digest(linked) == digest(images.parent)
    (images / "1.png").write_bytes(b"another")
    assert digest(linked) == digest(images.parent) != digest(tmp_path)


def test_atomic_writing_keeps_the_old_content_on_failure(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises(TypeError):
        write_atomic(path, 3)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_read_json_names_the_file(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x.json is not a JSON file"):
        read_json(tmp_path / "x.json")


CONFIG = {"program": "p", "lr": 0.1, "max_steps": None}


def begun(path, config=CONFIG, **options):
    run = Run(path, config, 1, **options)
    run.begin()
    return run


def test_a_resumed_run_remembers_the_step_of_its_checkpoint(tmp_path):
    first = begun(tmp_path / "r", resume=True)
    first.heartbeat({"step": 900, "steps": 1000, "saved_step": 800}, force=True)
    first._lock.close()
    begun(tmp_path / "r", resume=True).heartbeat({"step": 850}, force=True)
    status = read_json(tmp_path / "r" / "status.json")
    assert (status["step"], status["steps"], status["saved_step"]) == (850, 1000, 800)


def test_a_run_that_another_process_finished_meanwhile_is_not_begun_again(tmp_path):
    late = Run(tmp_path / "r", CONFIG, 1, resume=True)
    first = begun(tmp_path / "r", resume=True)
    first.log({"epoch": 1})
    first.finish(metrics={"final": 1.0, "best": 1.0}, parameters={"original": 1, "compressed": 1}, seconds=1.0)
    first._lock.close()
    with pytest.raises(ValueError, match="another process has just finished this run"):
        late.begin()
    assert (tmp_path / "r" / "metrics.jsonl").read_text()
    assert Run(tmp_path / "r", CONFIG, 1, resume=True).finished


def test_a_directory_belongs_to_one_configuration_and_one_process(tmp_path):
    run = begun(tmp_path / "r")
    with pytest.raises(ValueError, match="in use by another process"):
        begun(tmp_path / "r", resume=True)
    run._lock.close()
    with pytest.raises(ValueError, match=r"another configuration \(lr 0.1 there, 0.2 here\)"):
        Run(tmp_path / "r", {**CONFIG, "lr": 0.2}, 1, resume=True)
    with pytest.raises(ValueError, match=r"seed 1 there, 2 here"):
        Run(tmp_path / "r", CONFIG, 2)
    with pytest.raises(ValueError, match="unfinished run of this configuration: give --resume auto"):
        Run(tmp_path / "r", CONFIG, 1)
    Run(tmp_path / "r", CONFIG, 1, resume=True)
    Run(tmp_path / "r", {**CONFIG, "max_steps": 5}, 1, resume=True)
    with pytest.raises(ValueError, match="max_steps None there, 5 here"):
        Run(tmp_path / "r", {**CONFIG, "max_steps": 5}, 1)


def test_finished_runs_are_known_and_foreign_files_protected(tmp_path):
    run = begun(tmp_path / "r")
    run.finish(metrics={"final": 1.0, "best": 1.0}, parameters={"compressed": 1, "ratio": 1.0}, seconds=1.0)
    run._lock.close()
    assert Run(tmp_path / "r", CONFIG, 1).finished
    assert not Run(tmp_path / "r", {**CONFIG, "max_steps": 5}, 1, resume=True).finished
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "result.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds result.json but no config.json"):
        Run(tmp_path / "other", CONFIG, 1)
    assert (tmp_path / "other" / "result.json").read_text() == "{}"


def test_checking_creates_nothing(tmp_path):
    Run(tmp_path / "new", CONFIG, 1)
    assert not (tmp_path / "new").exists()


def test_flags_that_change_the_configuration_make_the_result_nobodys(tmp_path):
    assert Run(tmp_path, CONFIG, 1, row="t/r", row_config=config_hash(CONFIG)).row == "t/r"
    assert Run(tmp_path, CONFIG, 1, row="t/r", row_config="something else").row is None
    assert Run(tmp_path, CONFIG, 1, row="t/r").row == "t/r"


def test_the_log_is_cut_back_to_a_checkpoint(tmp_path):
    run = begun(tmp_path / "r")
    for epoch in range(4):
        run.log({"epoch": epoch})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "los')
    run.truncate_log(2)
    assert [json.loads(line)["epoch"] for line in (run.path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]


def test_failures_are_recorded(tmp_path):
    run = begun(tmp_path / "r")
    assert read_json(run.path / "status.json")["status"] == "running"

    def fail():
        with run.recorded():
            raise RuntimeError("loss is nan\nmore")

    with pytest.raises(RuntimeError):
        fail()
    status = read_json(run.path / "status.json")
    assert (status["status"], status["error"]) == ("failed", "RuntimeError: loss is nan")
