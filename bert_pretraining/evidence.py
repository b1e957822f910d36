"""The pre-training rows of evidence/: a small encoder on books, which two processor cores can train.

evidence/README.md has the command that prepares the books as data-bin/books.
"""

from __future__ import annotations

from bert_pretraining.config import PretrainingConfig
from bert_pretraining.downstream import SCRIPTS
from bert_pretraining.rows import FROBENIUS, OUTVAL, QUEKEY, SCORE
from common.tables.rows import Program, Row, Table

_MODEL = ("data-bin/books", "--layers", "2", "--embed-dim", "128", "--heads", "4", "--positions", "alibi")
_RECIPE = (*_MODEL, "--seq", "64", "--batch-size", "64")
_LAMB, _ADAMW = ("--lr", "2e-2"), ("--optimizer", "adamw", "--lr", "3e-3")
_NARROW = ("--rank-scale", "0.25")
_SPECTRAL = QUEKEY + OUTVAL
DECAYS = ("0.01", "0.1", "1")


def strength(weight_decay: str) -> Table:
    """Strengths of decay, of which the table below takes the best by validation loss, on a seed of its own."""
    recipe = (*_RECIPE, *_LAMB, *_NARROW, *_SPECTRAL, "--steps", "800", "--epoch-steps", "400")
    rows = [Row(f"weight-{d}", f"weight decay {d}", (*recipe, "--weight-decay", d), seeds=(0,)) for d in DECAYS]
    for d in DECAYS:
        flags = (*recipe, "--weight-decay", weight_decay, *FROBENIUS, "--frobenius-decay", d)
        rows.append(Row(f"frobenius-{d}", f"Frobenius decay {d} of both products", flags, seeds=(0,)))
    title = "The strength of decay in pre-training: heads of a quarter width from a spectral start, 3.3 million tokens"
    return Table("evidence-pretraining-strength", title, tuple(rows), (), SCORE)


PROGRAM = Program(PretrainingConfig.program, SCRIPTS, (strength("0.01"),), own_seeds=True)
