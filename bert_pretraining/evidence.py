"""The pre-training rows of evidence/: an encoder trained on books, small enough for two processor cores.

evidence/README.md has the command that prepares the books as data-bin/books.
"""

from __future__ import annotations

from bert_pretraining.config import PretrainingConfig
from bert_pretraining.downstream import SCRIPTS
from bert_pretraining.rows import CURVES, FROBENIUS, MATCHED, OUTVAL, QUEKEY, SCORE, fine_tuned
from common.tables.rows import Contrast, ContrastFigure, Program, Row, Table

_SIZE = ("data-bin/books", "--layers", "2", "--embed-dim", "128", "--heads", "4")
_RECIPE = ("--seq", "64", "--batch-size", "64")
_MODEL = (*_SIZE, "--positions", "alibi", *_RECIPE)
_LAMB, _ADAMW = ("--lr", "2e-2"), ("--optimizer", "adamw", "--lr", "3e-3")
_NARROW = ("--rank-scale", "0.25")
_SPECTRAL = QUEKEY + OUTVAL
DECAYS = ("0.01", "0.1", "1")


def strength(weight_decay: str) -> Table:
    """Strengths of decay on a separate seed. The table below uses those with the best validation loss."""
    recipe = (*_MODEL, *_LAMB, *_NARROW, *_SPECTRAL, "--steps", "800", "--epoch-steps", "400")
    rows = [Row(f"weight-{d}", f"weight decay {d}", (*recipe, "--weight-decay", d), seeds=(0,)) for d in DECAYS]
    for d in DECAYS:
        flags = (*recipe, "--weight-decay", weight_decay, *FROBENIUS, "--frobenius-decay", d)
        rows.append(Row(f"frobenius-{d}", f"Frobenius decay {d} of both products", flags, seeds=(0,)))
    title = "The strength of decay in pre-training: heads of a quarter width from a spectral start, 3.3 million tokens"
    return Table("evidence-pretraining-strength", title, tuple(rows), (), SCORE, decimals=3)


def positions(weight_decay: str) -> Table:
    """How an encoder learns with each kind of positions, at full width."""
    recipe = (*_SIZE, *_RECIPE, *_LAMB, "--steps", "800", "--epoch-steps", "400", "--weight-decay", weight_decay)
    rows = (
        Row("learned", "learned positions", recipe),
        Row("alibi", "ALiBi, equal on both sides", (*recipe, "--positions", "alibi")),
        Row(
            "directed-alibi",
            "ALiBi, half of the heads look back and half look ahead",
            (*recipe, "--positions", "directed-alibi"),
        ),
    )
    contrasts = (
        Contrast("directed against symmetric ALiBi", "directed-alibi", "alibi"),
        Contrast("symmetric ALiBi against learned positions", "alibi", "learned"),
    )
    title = "Positions in pre-training: full heads, 3.3 million tokens"
    return Table("evidence-pretraining-positions", title, rows, (), SCORE, contrasts, decimals=3)


def schemes(weight_decay: str, frobenius_decay: str) -> Table:
    """Both schemes at the strengths chosen from the table above."""
    recipe = (*_MODEL, "--steps", "5000", "--epoch-steps", "1000", "--weight-decay", weight_decay)
    lamb, narrow = (*recipe, *_LAMB), (*recipe, *_LAMB, *_NARROW)
    both = (*narrow, *_SPECTRAL, *FROBENIUS, "--frobenius-decay", frobenius_decay)
    rows = (
        Row("full", "full heads, LAMB", lamb),
        Row("regular", "quarter-width heads, LAMB", narrow),
        Row("spectral", "quarter-width heads, LAMB, spectral initialization of both products", (*narrow, *_SPECTRAL)),
        Row("spectral+frobenius", "quarter-width heads, FLAMBe, spectral initialization of both products", both),
        Row(
            "norm-matched",
            "quarter-width heads, LAMB, regular initialization at the norms of the spectral one",
            (*narrow, *MATCHED),
        ),
        Row("adamw-spectral", "quarter-width heads, AdamW, spectral initialization", (*recipe, *_ADAMW, *_NARROW, *_SPECTRAL)),
    )
    contrasts = (
        Contrast("spectral initialization, under weight decay", "spectral", "regular"),
        Contrast("its scale alone, under weight decay", "norm-matched", "regular"),
        Contrast("all but its scale (directions, spectrum, balance)", "spectral", "norm-matched"),
        Contrast("Frobenius decay, from a spectral start", "spectral+frobenius", "spectral"),
        Contrast("both schemes", "spectral+frobenius", "regular"),
        Contrast("what is left to full heads", "spectral+frobenius", "full"),
        Contrast("AdamW in place of LAMB", "adamw-spectral", "spectral"),
    )
    title = "Pre-training on books: heads of a quarter width, 20.5 million tokens"
    return Table("evidence-pretraining", title, rows, (ContrastFigure(), *CURVES), SCORE, contrasts, decimals=3)


def grammar(before: Table) -> Table:
    """BLiMP without fine-tuning, 50 pairs of each paradigm. The committed runs put </s> after each sentence."""
    flags = ("--data", "data/blimp.tsv.xz", "--pairs", "50", "--end-token")
    rows = tuple(fine_tuned(before, row, *flags, script="blimp.py") for row in before.rows)
    title = "Grammatical judgements (BLiMP, 50 pairs of each paradigm) after pre-training on books"
    return Table("evidence-pretraining-blimp", title, rows, (), "accuracy in percent", before.contrasts)


def sentiment(before: Table) -> Table:
    """SST-2, fine-tuned from the runs of the schemes."""
    flags = ("--train", "data/sst2.train.tsv", "--dev", "data/sst2.dev.tsv", "--test", "data/sst2.test.tsv", "--lr", "3e-4")
    chosen = [row for row in before.rows if row.id in ("full", "regular", "spectral", "spectral+frobenius")]
    rows = tuple(fine_tuned(before, row, "--task", "sentences", *flags) for row in chosen)
    ids = {row.id for row in rows}
    contrasts = tuple(each for each in before.contrasts if {each.row, each.base} <= ids)
    return Table(
        "evidence-pretraining-sst2", "SST-2 after pre-training on books", rows, (), "test accuracy in percent", contrasts
    )


# Each is the best of three by validation loss, from the table of strengths.
WEIGHT_DECAY, FROBENIUS_DECAY = "0.1", "0.01"
SCHEMES = schemes(WEIGHT_DECAY, FROBENIUS_DECAY)
PROGRAM = Program(
    PretrainingConfig.program,
    SCRIPTS,
    (strength(WEIGHT_DECAY), positions(WEIGHT_DECAY), SCHEMES, grammar(SCHEMES), sentiment(SCHEMES)),
    own_seeds=True,
)
