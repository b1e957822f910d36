"""Numbers in Markdown documents, verdicts on claims, and the links and commands that documents quote."""

import argparse
import importlib
import io
import json
import math
import re
import shlex
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import ClassVar

import pytest

from common.experiments.config import Config, flag
from common.experiments.files import ROOT
from common.experiments.results import RunResult
from common.tables import claims, documents, plot, rendering
from common.tables.__main__ import main
from common.tables.documents import BLOCKS, INLINE, Evidence, fill, fill_all
from common.tables.reading import Results, read
from common.tables.rows import Contrast, Program, Row, Table, kinds, programs
from common.tables.summaries import ContrastResult

KINDS = kinds(programs())
PATTERNS = ("*.md", "docs/**/*.md", "*/README.md", "benchmarks/*.md", "evidence/*/*.md")
MARKDOWN = sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern) if not path.parent.name.startswith(".")})


@pytest.fixture(scope="module")
def committed():
    return Evidence(programs("evidence"), Results(read(ROOT / "evidence", KINDS)[0], KINDS), KINDS)


def test_documents_are_freshly_filled(committed):
    """``python -m common.tables collect --evidence`` fills them."""
    found = documents.documents()
    assert {ROOT / "README.md", ROOT / "docs" / "findings.md", ROOT / "docs" / "findings" / "both-schemes.md"} <= set(found)
    for path in found:
        text = path.read_text()
        assert fill(text, path.name, committed) == text, f"{path} is out of date"


# Rows "a" and "b" of two tables, on made-up results.


@dataclass(kw_only=True)
class OneConfig(Config):
    program: ClassVar[str] = "p"
    width: int = flag(1, type=int)


def two_rows(**options):
    rows = (Row("a", "", ("--width", "2")), Row("b", "", ("--width", "3")), Row("c-b", "", ("--width", "4")))
    contrasts = (Contrast("a or b?", "a", "b"), Contrast("b or c?", "b", "c-b"))
    return replace(Table("t", "A title", rows, (), "accuracy in percent", contrasts), **options)


ACCURACIES = {"a": (70.0, 72.0, 74.0), "b": (71.0, 70.0, 69.0)}


def evidence_of(root, finals, table=None, metrics=()):
    """Evidence of rows whose seeds, from 1 on, have these final values; ``metrics`` are lines of each run's metrics.jsonl."""
    table = table or two_rows()
    program = Program("p", {"train.py": OneConfig}, (table,))
    runs = []
    for row in table.rows:
        for seed, final in enumerate(finals.get(row.id, ()), 1):
            path = root / row.id / str(seed) / "result.json"
            path.parent.mkdir(parents=True)
            lines = [{key: value * seed if key == "norm" else value for key, value in line.items()} for line in metrics]
            path.with_name("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            run = RunResult(
                row=None,
                script="train.py",
                config=program.record(row),
                config_hash=program.config_hash(row),
                seed=seed,
                metrics={"final": final, "best": final + 1, "extra": 5.0},
                parameters={"original": 100, "compressed": 1234, "ratio": 0.25},
                seconds=1800.0,
                path=path,
            )
            runs.append(run)
    known = {("p", "train.py"): OneConfig}
    return Evidence([program], Results(runs, known), known, root)


def inline(evidence, marker):
    found = re.fullmatch(r"x <!-- (.*) -->(.*)<!-- / -->", fill(f"x <!-- {marker} -->old<!-- / -->", "d.md", evidence))
    assert found is not None
    assert found[1] == marker
    return found[2]


def test_markers_within_a_line(tmp_path):
    """Differences -1, 2 and 5: Student's distribution with two degrees of freedom has a closed form."""
    epochs = [{"epoch": 0, "norm": 30.0}, {"epoch": 1, "norm": 2.0, "loss": 0.5}, {"epoch": 2, "norm": 0.0123}]
    evidence = evidence_of(tmp_path, ACCURACIES, metrics=epochs)
    assert inline(evidence, "row t/a") == "72.00 ± 2.00 (n = 3)"
    assert inline(evidence, "final t/a") == "72.00 ± 2.00"
    reach, t = math.sqrt(2 * 0.95**2 / (1 - 0.95**2)) * math.sqrt(3), 2 / math.sqrt(3)
    p = 1 - t / math.sqrt(2 + t * t)
    effect = f"+2.00 points [{2 - reach:+.2f}, {2 + reach:+.2f}], p = {p:.3f}, n = 3"
    assert effect == "+2.00 points [-5.45, +9.45], p = 0.368, n = 3"
    assert inline(evidence, "contrast t/a b") == effect
    assert inline(evidence, "scatter t") == "3.00 to 3.00 points"
    assert inline(evidence, "metric t/a norm first") == "60.0"  # mean of 30, 60 and 90
    assert inline(evidence, "metric t/a norm 1") == "4.00"
    assert inline(evidence, "metric t/a norm last") == "0.0246"
    assert inline(evidence, "metric t/a loss last") == "0.500"  # the last epoch that has it
    assert inline(evidence, "cost") == "6 runs, 3.0 hours in total with one thread a run"


def test_markers_of_few_runs_and_of_losses(tmp_path):
    evidence = evidence_of(tmp_path, {"a": (70.0,), "b": (71.0,)})
    assert inline(evidence, "row t/a") == "70.00 (n = 1)"
    assert inline(evidence, "contrast t/a b") == "-1.00 points (n = 1)"
    assert inline(evidence, "scatter t") == "not known (n = 1)"
    for marker in ("row t/c-b", "final t/c-b", "contrast t/b c-b", "metric t/c-b norm last"):
        assert inline(evidence, marker) == "not run"
    losses = two_rows(score="masked loss in nats (lower is better)", decimals=3)
    finals = {"a": (3.0, 3.0001, 3.0002), "b": (4.0, 4.0002, 4.0)}
    evidence = evidence_of(tmp_path / "losses", finals, losses)
    assert inline(evidence, "row t/a") == "3.000 ± 0.000 (n = 3)"
    assert inline(evidence, "contrast t/a b") == "-1.000 nats [-1.000, -1.000], p < 0.001, n = 3"


def block(evidence, marker):
    found = re.fullmatch(
        r"(<!-- .* -->)\n\n(.*)\n\n<!-- / -->\n", fill(f"<!-- {marker} --><!-- / -->\n", "d.md", evidence), re.S
    )
    assert found is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[2].splitlines() if line]


def test_markers_of_whole_blocks(tmp_path):
    evidence = evidence_of(tmp_path, ACCURACIES, metrics=[{"epoch": 1, "valid_loss": 0.5}])
    header, _, *rows = block(evidence, "table t")
    assert header == ["Row", "n", "Parameters", "Final", "Best"]
    assert rows[0] == ["a", "3", "1,234", "72.00 ± 2.00", "73.00 ± 2.00"]
    assert rows[2] == ["c-b", "0", "-", "-", "-"]
    header, _, first, second, [below] = block(evidence, "contrasts t")
    assert header == ["Question", "n", "Difference", "95 % interval", "p"]
    assert first == ["a or b?", "3", "+2.00", "[-5.45, +9.45]", "0.368"]
    assert second[1] == "0"
    assert below == "Tests: 1. Intervals that exclude zero: 0. Below the Bonferroni threshold of 0.05 / 1 = 0.05: 0."
    assert block(evidence, "bonferroni")[2:] == [["`t`", "1", "0.05", "none"]]
    _, _, *rows = block(evidence, "runs t final extra valid_loss")
    assert rows[0] == ["a", "1", "70.00", "5.00", "0.500", "1800"]
    assert len(rows) == 6


def test_bonferronis_threshold_counts_the_tests_of_a_table(tmp_path):
    """Of two contrasts, one with p between 0.025 and 0.05 does not pass."""
    finals = {"a": (70.0, 72.0, 74.0), "b": (62.0, 60.0, 70.0), "c-b": (72.0, 60.1, 70.0)}
    evidence = evidence_of(tmp_path, finals)
    (one, _), (other, _) = evidence.contrasts("t")
    assert one.p is not None
    assert other.p is not None
    assert 0.05 < one.p < 0.1
    assert other.p > 0.05
    count, threshold, passed = evidence.tests("t")
    assert (count, threshold, passed) == (2, 0.025, [])
    evidence = evidence_of(tmp_path / "x", {**finals, "b": (60.0, 62.0, 64.1)})
    assert [each.question for each in evidence.tests("t")[2]] == ["a or b?"]


def test_a_filled_document_stays_as_it_is(tmp_path):
    evidence = evidence_of(tmp_path, ACCURACIES)
    text = "# A\n\nOne <!-- row t/a --><!-- / -->, *two* <!-- cost -->x\ny<!-- / -->.\n\n<!-- table t -->\n<!-- / -->\n\nEnd\n"
    once = fill(text, "d.md", evidence)
    assert once.startswith("# A\n\nOne <!-- row t/a -->72.00 ± 2.00 (n = 3)<!-- / -->, *two* <!-- cost -->6 runs")
    assert once.endswith("<!-- / -->\n\nEnd\n")
    assert fill(once, "d.md", evidence) == once
    assert fill("no marker\n", "d.md", evidence) == "no marker\n"


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("<!-- nothing t/a -->x<!-- / -->", "there is no marker 'nothing': there are row, final,"),
        ("<!-- row t/z -->x<!-- / -->", "table t has no row 'z': it has a, b, c-b"),
        ("<!-- row z/a -->x<!-- / -->", "there is no table 'z': there are t"),
        ("<!-- contrast t/a c-b -->x<!-- / -->", "table t has no contrast of a and 'c-b': it has t/a b; t/b c-b"),
        ("<!-- metric t/a nothing last -->x<!-- / -->", "has no metric 'nothing' at epoch 'last': it has epoch, norm"),
        ("<!-- metric t/a norm 7 -->x<!-- / -->", "has no metric 'norm' at epoch '7'"),
        ("<!-- row t/a t/b -->x<!-- / -->", "marker row cannot take 't/a t/b'"),
        ("<!-- runs t nothing -->x<!-- / -->", "has no metric 'nothing'"),
        ("<!-- compare nothing/* -->x<!-- / -->", "no run is at nothing/*"),
        ("<!-- row t/a -->x <!-- row t/b -->y<!-- / -->", "<!-- row t/a --> is not closed"),
        ("<!-- row t/a -->x", "or has no <!-- / -->"),
        ("x<!-- / -->", "no marker before it"),
        ("<!-- row t/a x<!-- / -->", "this comment is not a marker"),
    ],
)
def test_errors_name_document_and_line(tmp_path, marker, message):
    evidence = evidence_of(tmp_path, ACCURACIES, metrics=[{"epoch": 0, "norm": 1.0}])
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        fill(f"one <!-- row t/b --><!-- / -->\n\nthree {marker}\n", "docs/d.md", evidence)
    assert str(error.value).startswith("docs/d.md:3: ")


@pytest.mark.parametrize("before", ["", "  ", "- ", "1. ", "> "])
def test_a_marker_cannot_begin_a_line(tmp_path, before):
    """To CommonMark such a line is HTML: a paragraph would end there, and emphasis and links would not work."""
    with pytest.raises(ValueError, match=r"d\.md:2: a line that begins with a marker"):
        fill(f"text\n{before}<!-- row t/a --><!-- / -->", "d.md", evidence_of(tmp_path, ACCURACIES))


def difference(n, low=None, high=None):
    return ContrastResult("", "a", "b", n, 1.0 if n else None, low, high, None)


@pytest.mark.parametrize(
    ("found", "paper", "said"),
    [
        (difference(3, 0.1, 2.0), "+", "supported"),
        (difference(3, 0.1, 2.0), "-", "not supported"),
        (difference(3, -2.0, -0.1), "+", "not supported"),
        (difference(3, -2.0, -0.1), "-", "supported"),
        (difference(3, -0.1, 2.0), "+", "inconclusive"),
        (difference(3, 0.0, 2.0), "+", "inconclusive"),
        (difference(3, -2.0, 0.1), "-", "inconclusive"),
        (difference(2), "+", "inconclusive"),  # equal differences have no interval
        (difference(1), "+", "exploratory (n = 1)"),
        (difference(0), "-", "not tested"),
    ],
)
def test_verdicts_follow_from_interval_and_direction(found, paper, said):
    assert claims.verdict(found, paper) == said


CLAIM = """
[[claim]]
id = "one"
claim = "A beats B"
paper = "abstract"
setting = "small"
[[claim.comparison]]
of = "t/a b"
paper = "+"
{more}
"""


def write_claims(root, more="", text=CLAIM):
    folder = root / "docs" / "findings"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "one.md").write_text("# A beats B\n")
    (folder / "claims.toml").write_text(text.replace("{more}", more))


def test_the_table_of_claims(tmp_path):
    finals = {"a": (70.0, 72.0, 74.0), "b": (60.0, 62.0, 64.1)}
    evidence = evidence_of(tmp_path, finals, metrics=[{"epoch": 0, "norm": 9.0}, {"epoch": 1, "norm": 2.0}])
    write_claims(tmp_path, "planned = [1, 2]")
    header, _, row = block(evidence, "claims")
    assert header == ["Claim", "In the paper", "Verdict", "Effect, 95 % interval", "Setting"]
    assert row[:3] == ["[A beats B](findings/one.md)", "abstract", "inconclusive"]  # the two planned differences are equal
    later = f" (with seeds added later: {inline(evidence, 'contrast t/a b')})"
    assert row[3] == f"+10.00 points (n = 2); expected above 0{later}"
    write_claims(tmp_path)
    row = block(evidence, "claims")[2]
    assert row[2:4] == ["supported; also after Bonferroni", f"{inline(evidence, 'contrast t/a b')}; expected above 0"]
    assert block(evidence, "claims one")[2] == row[1:]
    write_claims(tmp_path, 'label = "x"\n[[claim.comparison]]\nlabel = "y"\nof = "t/b c-b"\npaper = "-"')
    row = block(evidence, "claims")[2]
    assert row[2] == "x: supported; also after Bonferroni<br>y: not tested"
    assert row[3].endswith("<br>y: not run")
    write_claims(
        tmp_path, 'label = "x"\nmetric = "norm"\n[[claim.comparison]]\nlabel = "y"\nof = "t/b a"\npaper = "-"\nmetric = "norm"'
    )
    row = block(evidence, "claims")[2]
    assert row[2:4] == [
        "both: inconclusive",
        "x: +0.00 (n = 3); expected above 0<br>y: +0.00 (n = 3); expected below 0",
    ]  # of norms that are equal


def test_a_claim_has_a_line_for_each_setting(tmp_path):
    evidence = evidence_of(tmp_path, {"a": (70.0, 72.0, 74.0), "b": (60.0, 62.0, 64.1)})
    write_claims(tmp_path, '[[claim.comparison]]\nof = "t/b c-b"\npaper = "-"\nsetting = "large"')
    lines = block(evidence, "claims")[2:]
    assert [(line[0], line[1], line[2], line[4]) for line in lines] == [
        ("[A beats B](findings/one.md)", "abstract", "supported; also after Bonferroni", "small"),
        ("", "", "not tested", "large"),
    ]
    assert block(evidence, "claims one")[2:] == [line[1:] for line in lines]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('paper = "+"', 'paper = "up"'), 'claim \'one\' needs comparisons, each with paper = "+" or "-"'),
        (('setting = "small"', ""), "claim 'one' has unknown fields or lacks some"),
        (('setting = "small"', 'setting = "small"\nx = 1'), "claim 'one' has unknown fields or lacks some"),
        (('id = "one"', 'id = "two"'), "claim 'two' has no page two.md beside claims.toml"),
        (('of = "t/a b"', 'of = "t/a z"'), "claim 'one' in claims.toml: table t has no contrast of a and 'z'"),
        (("[[claim]]", "[[claim"), "claims.toml is not a TOML file"),
    ],
)
def test_wrong_claims_are_named(tmp_path, change, message):
    write_claims(tmp_path, text=CLAIM.replace("{more}", "").replace(*change))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        fill("<!-- claims --><!-- / -->", "d.md", evidence_of(tmp_path, ACCURACIES))
    assert str(error.value).startswith("d.md:1: ")


def test_filling_writes_what_changed_and_nothing_where_a_document_has_an_error(tmp_path):
    evidence = evidence_of(tmp_path / "runs", ACCURACIES)
    evidence.root = tmp_path
    texts = {
        "README.md": "x <!-- row t/a --><!-- / -->",
        "evidence/README.md": "y",
        "docs/a/b.md": "x <!-- row t/z -->x<!-- / -->",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"docs/a/b\.md:1: table t has no row 'z'"):
        fill_all(evidence)
    assert (tmp_path / "README.md").read_text() == texts["README.md"]
    (tmp_path / "docs/a/b.md").write_text("x <!-- row t/b --><!-- / -->")
    assert fill_all(evidence) == [tmp_path / "README.md", tmp_path / "docs/a/b.md"]
    assert (tmp_path / "docs/a/b.md").read_text() == "x <!-- row t/b -->70.00 ± 1.00 (n = 3)<!-- / -->"
    assert fill_all(evidence) == []


def test_documents_are_filled_from_all_the_evidence_alone(tmp_path, monkeypatch, capsys):
    filled = []
    monkeypatch.setattr(documents, "fill_all", lambda evidence: filled.append(len(evidence.tables)) or [ROOT / "README.md"])
    monkeypatch.setattr(rendering, "write", lambda *args: None)
    monkeypatch.setattr(plot, "write", lambda *args: [])
    for words in (["--table", "evidence-decay"], ["--out", str(tmp_path)], ["--subproject", "resnet_cifar"]):
        main(["collect", "--evidence", *words])
    assert filled == []
    main(["collect", "--evidence"])
    assert filled == [sum(len(program.tables) for program in programs("evidence"))]
    assert "filled: README.md" in capsys.readouterr().err


def test_findings_have_a_short_section_for_each_claim():
    """And at most 120 words in it; the page of a claim has its line of the table of claims."""
    found = claims.read(ROOT / "docs" / "findings" / "claims.toml")
    text = re.sub(r"<!--.*?-->", "", (ROOT / "docs" / "findings.md").read_text())
    sections = re.findall(r"^### .*?(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert [re.findall(r"\(findings/([\w-]+)\.md\)", section)[-1] for section in sections] == [claim.id for claim in found]
    assert [section for section in sections if len(section.split()) > 120] == []
    for claim in found:
        assert f"<!-- claims {claim.id} -->" in (ROOT / "docs" / "findings" / f"{claim.id}.md").read_text()
    assert {path.stem for path in (ROOT / "docs" / "findings").glob("*.md")} == {claim.id for claim in found}


def prose(text):
    """The text without blocks of code and comments."""
    return re.sub(r"^```.*?^```|^    .*?$|<!--.*?-->|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text):
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_anchors_are_those_of_github():
    assert anchors("# Pre-training: `bert_pretraining`\n## It's 10 % (n = 1)") == {
        "pre-training-bert_pretraining",
        "its-10--n--1",
    }


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_documents_lead_somewhere(path, committed):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text())):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (path.parent / target).resolve() if target else path
        program, table = committed.tables.get(file.parent.name, (None, None))
        if table is not None and not any(committed.results.of(program, row) for row in table.rows):
            continue  # its file comes with its first run
        assert file.exists(), link
        assert not anchor or anchor in anchors(file.read_text()), link


def commands(text):
    """The commands that a document quotes: those in blocks of code, and those within a line, which may be cut short."""
    fenced = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks = "\n".join([*fenced, *re.findall(r"^    (.*)$", text, re.MULTILINE)]).replace("\\\n", " ")
    quoted = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```|^    .*?$", "", text, flags=re.MULTILINE | re.DOTALL))
    for line, whole in [*((line, True) for line in blocks.splitlines()), *((line, False) for line in quoted)]:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:
            continue  # not a line of shell
        begun = True
        for index, word in enumerate(words):
            if begun and word in ("python", "bash"):
                end = next((i for i in range(index, len(words)) if set(words[i]) <= set("|&;<>")), len(words))
                yield words[index:end], whole
            begun = (begun and "=" in word) or set(word) <= set("|&;<>")


class Parsed(Exception):
    """A command line was parsed as far as its program's parser goes."""


def parse_as_its_program_does(monkeypatch, name, words):
    """Call the program's ``main``, which ends where its command line is parsed; returns what its parser says against it."""
    depth, original = [0], argparse.ArgumentParser.parse_known_args

    def stop(self, *args, **kwargs):
        depth[0] += 1
        found = original(self, *args, **kwargs)
        depth[0] -= 1
        if depth[0]:
            return found  # a parser of subcommands
        raise Parsed(*found[1])

    errors = io.StringIO()
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    monkeypatch.setattr(sys, "argv", [name, *words])
    try:
        with redirect_stderr(errors), redirect_stdout(io.StringIO()):
            importlib.import_module(name).main()
    except Parsed as parsed:
        return f"unknown: {parsed}" if parsed.args else ""
    except SystemExit:
        return errors.getvalue()
    finally:
        monkeypatch.undo()
    raise AssertionError(f"{name} parsed no command line")


def script_exists(pattern):
    """Whether rows have generated scripts of such a path, which may have wildcards."""
    everything = [*programs(), *programs("evidence")]
    scripts = [
        f"generated-scripts/{program.name}/{table.id}/{row.id}.sh"
        for program in everything
        for table in program.tables
        for row in table.rows
    ]
    lists = [f"generated-scripts/{program.name}/{table.id}.txt" for program in everything for table in program.tables]
    return any(fnmatch(script, pattern) for script in [*scripts, *lists])


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_documents_work(path, monkeypatch, tmp_path):
    """Their files exist, and their flags are those that the programs' parsers know."""
    text = path.read_text()
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    placeholders = {"N": "1", "M": "1", "DATA_DIR": str(tmp_path)}
    for script in re.findall(r"generated-scripts/[\w./*+-]+\.(?:sh|txt)", text):
        assert "SUBPROJECT" in script or script_exists(script), script
    for words, whole in commands(text):
        if words[0] == "bash":
            check_bash(words[1:])
            continue
        module = words[1] == "-m"
        assert module or (ROOT / words[1]).is_file(), words
        name = words[2] if module else words[1].removesuffix(".py").replace("/", ".")
        name = f"{name}.__main__" if (ROOT / name.replace(".", "/") / "__main__.py").exists() else name
        rest = [placeholders.get(word, word) for word in words[3 if module else 2 :]]
        said = parse_as_its_program_does(monkeypatch, name, rest)
        assert said == "" or (not whole and "arguments are required" in said), (words, said)


def check_bash(words):
    """The verbs and flags of setup.sh are those of its usage; other scripts are generated ones, or a command after -c."""
    if words[0] == "setup.sh":
        usage = re.findall(r"^#(?: Usage:)?.*$", (ROOT / "setup.sh").read_text(), re.MULTILINE)
        assert [word for word in words[1:] if word not in " ".join(usage)] == [], words
    else:
        assert words[0] == "-c" or script_exists(words[0]), words


def test_every_kind_of_marker_is_in_use_and_documented():
    text = "".join(path.read_text() for path in documents.documents())
    for kind in INLINE | BLOCKS:
        assert re.search(rf"<!-- {kind}( [^\n]*?)? -->", text), kind
        assert re.search(rf"\b{kind}\b", documents.__doc__ or ""), kind


def test_the_readme_counts_the_rows_of_each_table():
    counts = {table.id: len(table.rows) for program in programs() for table in program.tables}
    counted = Counter()
    for cells in re.findall(r"^\| (`.*?) \|.*?\| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE):
        first, *others = re.findall(r"`([^`]+)`", cells[0])
        ids = [first] + [id if id in counts else first.rsplit("-", id.count("-"))[0] + id for id in others]
        assert int(cells[1]) == sum(counts[id] for id in ids), ids
        counted.update(ids)
    assert counted == Counter(counts.keys())
