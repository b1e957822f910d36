"""The pre-training rows: both schemes in attention, under LAMB, FLAMBe and AdamW, at the size of BERT and at smaller ones.

The paper claims that both schemes help unsupervised pre-training. Its pre-training code was never released, and its recipe is
not known. The base and large rows use the recipe that NVIDIA published for BERT with LAMB (DeepLearningExamples,
run_pretraining.sh). It has two phases: 7,038 steps of 65,536 sequences of 128 tokens, then 1,563 steps of 32,768 sequences of
512 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bert_pretraining.config import PretrainingConfig
from bert_pretraining.downstream import SCRIPTS
from common.tables.rows import CurveFigure, Program, Published, Row, Table

CORPUS = "data-bin/wikipedia-books"  # a corpus of your own, prepared with 30,000 words: BERT's corpus has no stable source
WIKITEXT = "data-bin/wikitext-103"
SCORE = "masked loss in nats (lower is better; final: test split, last weights; best: validation split, best epoch)"
CURVES = (CurveFigure("curves", ("valid_loss", "quekey_norm", "outval_norm")),)
QUEKEY, OUTVAL = ("--spectral-quekey",), ("--spectral-outval",)
FLAMBE_QUEKEY, FLAMBE_OUTVAL = ("--wd2fd-quekey",), ("--wd2fd-outval",)
FROBENIUS = FLAMBE_QUEKEY + FLAMBE_OUTVAL
MATCHED = ("--quekey-init", "norm-matched", "--outval-init", "norm-matched")
INITS = {
    "regular": ((), "regular initialization"),
    "spectral": (QUEKEY + OUTVAL, "spectral initialization of both products"),
}
# Truncation keeps all of a full-width head, so spectral initialization only balances its factors.
FULL_INITS = {
    **INITS,
    "spectral": (QUEKEY + OUTVAL, "both products balanced, which is all that spectral initialization does here"),
}
NARROW_INITS = {
    **INITS,
    "norm-matched": (MATCHED, "regular initialization at the norms of the spectral one"),
    "narrow": ((*QUEKEY, *OUTVAL, "--spectral-from", "narrow"), "narrow heads drawn regularly and balanced"),
}
OPTIMIZERS = {
    "lamb": ((), "LAMB with weight decay"),
    "flambe": (FROBENIUS, "FLAMBe (Frobenius decay of both products)"),
}
_ONE_PRODUCT = {
    "quekey": (QUEKEY + FLAMBE_QUEKEY, "FLAMBe and spectral initialization of query-key products alone"),
    "outval": (OUTVAL + FLAMBE_OUTVAL, "FLAMBe and spectral initialization of output-value products alone"),
}
_ADAMW = {
    "adamw-full": ((), "full heads, AdamW"),
    "adamw-0.5": (("--rank-scale", "0.5"), "half-width heads, AdamW"),
    "adamw-0.5-both": (
        ("--rank-scale", "0.5", *QUEKEY, *OUTVAL, *FROBENIUS),
        "half-width heads, AdamW, spectral initialization and decoupled Frobenius decay of both products",
    ),
}


def methods() -> dict[str, tuple[tuple[str, ...], str]]:
    """The rows of one size by name: the flags that differ from the LAMB recipe, and a description."""
    found = {}
    for optimizer, (decay, decayed) in OPTIMIZERS.items():
        for init, (flags, words) in FULL_INITS.items():
            found[f"1-{optimizer}-{init}"] = ((*flags, *decay), f"full heads, {decayed}, {words}")
        for init, (flags, words) in NARROW_INITS.items():
            label = f"half-width heads, {decayed}, {words}"
            found[f"0.5-{optimizer}-{init}"] = (("--rank-scale", "0.5", *flags, *decay), label)
    for product, (flags, words) in _ONE_PRODUCT.items():
        found[f"0.5-flambe-{product}"] = (("--rank-scale", "0.5", *flags), f"half-width heads, {words}")
    return found


# The known SQuAD scores come from a summary of the paper that may be machine-written, and may confuse base and large.
_SUMMARY = "a second-hand summary of the paper, unverified"
_BASE = {"1-lamb-regular": Published(88.55, _SUMMARY), "0.5-flambe-spectral": Published(87.69, _SUMMARY)}
# Batch size, learning rate, warm-up, steps, length, predictions and steps per epoch of both phases; then the shared flags.
_PHASES = (("65536", "6e-3", "0.2843", "7038", "128", "20", "391"), ("32768", "4e-3", "0.128", "1563", "512", "80", "521"))
# The bound of 1 on the norm of the gradients is the default of timm's Lamb, which follows NVIDIA's; dropout is that of BERT.
_LAMB = ("--weight-decay", "0.01", "--clip-norm", "1", "--lr-power", "0.5", "--dropout", "0.1")
# AdamW with the batch size, learning rate and warm-up of Izsak et al. 2021, for as many sequences as with LAMB.
_ADAMW_PHASES = (
    ("4096", "1e-3", "0.06", "112608", "128", "20", "6256"),
    ("4096", "1e-3", "0.06", "12504", "512", "80", "4168"),
)
_ADAMW_RECIPE = ("--optimizer", "adamw", "--beta2", "0.98", "--weight-decay", "0.01", "--clip-norm", "1", "--dropout", "0.1")


def _phase(values: tuple[str, ...]) -> tuple[str, ...]:
    names = ("--batch-size", "--lr", "--warmup", "--steps", "--seq", "--predictions", "--epoch-steps")
    return tuple(word for pair in zip(names, values, strict=True) for word in pair)


def _hours(size: str, phase: tuple[str, ...]) -> float:
    """GPU-hours at 10^14 operations per second, counting 6 operations per token and weight outside of the embeddings."""
    weights = {"base": 85e6, "large": 302e6}[size]
    batch, steps, length = int(phase[0]), int(phase[3]), int(phase[4])
    return 6 * weights * batch * steps * length / 1e14 / 3600


def two_phases(size: str) -> Table:
    """The rows of BERT-base or BERT-large. A row is a second phase; its first phase runs before it."""
    rows: list[Row] = []
    for name, (flags, words) in {**methods(), **_ADAMW}.items():
        (first, second), recipe = (_ADAMW_PHASES, _ADAMW_RECIPE) if name in _ADAMW else (_PHASES, _LAMB)
        shared = (CORPUS, "--model", size, "--amp", "bf16", *recipe, *flags, "--update-freq", "64")
        before = Row(f"{name}-phase1", f"{words}; sequences of 128", (*shared, *_phase(first)), hours=_hours(size, first))
        start = ("--init-from", "{after}", "--pretraining", PretrainingConfig.parse(before.flags).config_hash())
        flags = (*shared, *_phase(second), *start)
        rows += [before, Row(name, f"{words}; then sequences of 512", flags, hours=_hours(size, second), after=before)]
    return Table(f"pretraining-{size}", f"Pre-training of BERT-{size}, in two phases", tuple(rows), CURVES, SCORE, decimals=3)


def squad(size: str, known: Mapping[str, Published]) -> Table:
    """SQuAD v1.1, fine-tuned from the second phase of each row."""
    before = two_phases(size)
    flags = ("--task", "squad", "--train", "data/squad/train-v1.1.json", "--dev", "data/squad/dev-v1.1.json")
    rows = [fine_tuned(before, row, *flags, "--lr", "3e-5", "--epochs", "2", hours=1) for row in before.own_runs()]
    rows = [replace(row, published=known.get(row.id)) for row in rows]
    title = f"SQuAD v1.1 after pre-training of BERT-{size}"
    return Table(f"pretraining-{size}-squad", title, tuple(rows), (), "F1 on SQuAD v1.1's development set, in percent")


def fine_tuned(table: Table, row: Row, *flags: str, script: str = "finetune.py", hours: float = 0.0) -> Row:
    """A row that starts from the run of ``row`` in another table."""
    hash = PretrainingConfig.parse(row.flags).config_hash()
    words = ("--init-from", "{after}", "--pretraining", hash, *flags)
    return Row(row.id, row.label, words, hours, seeds=row.seeds, script=script, after=replace(row, table=table.id))


def mini() -> Table:
    """The same methods at the size of BERT-mini: an hour on one GPU."""
    recipe = (WIKITEXT, "--model", "mini", "--positions", "alibi", "--seq", "128", "--batch-size", "512", "--steps", "20000")
    recipe += ("--epoch-steps", "1000", "--amp", "bf16", "--clip-norm", "1")
    rows = [Row(name, words, (*recipe, "--lr", "1e-2", *flags), hours=1) for name, (flags, words) in methods().items()]
    adamw = ("--optimizer", "adamw", "--lr", "2e-3", "--beta2", "0.98")
    rows += [Row(name, words, (*recipe, *adamw, *flags), hours=1) for name, (flags, words) in _ADAMW.items()]
    return Table(
        "pretraining-mini", "Pre-training of BERT-mini on WikiText-103, one GPU", tuple(rows), CURVES, SCORE, decimals=3
    )


def quickstart() -> Table:
    recipe = ("data-bin/pretraining-numbers", "--layers", "2", "--embed-dim", "128", "--heads", "4", "--positions", "alibi")
    recipe += ("--seq", "64", "--batch-size", "32", "--steps", "400", "--epoch-steps", "100", "--lr", "1e-2")
    rows = [Row("dense", "full heads, LAMB", recipe, seeds=(1,))]
    for name, flags, words in (
        ("regular", (), "LAMB, regular initialization"),
        ("spectral", QUEKEY + OUTVAL, "LAMB, spectral initialization of both products"),
        ("both", (*QUEKEY, *OUTVAL, *FROBENIUS), "FLAMBe, spectral initialization of both products"),
    ):
        rows.append(Row(name, f"half-width heads, {words}", (*recipe, "--rank-scale", "0.5", *flags), seeds=(1,)))
    title = "Quickstart of pre-training: sentences about numbers, minutes on a laptop; not a result"
    return Table("quickstart-pretraining", title, tuple(rows), CURVES, SCORE, decimals=3)


PROGRAM = Program(
    PretrainingConfig.program,
    SCRIPTS,
    (two_phases("base"), squad("base", _BASE), two_phases("large"), squad("large", {}), mini(), quickstart()),
)
