"""The translation rows of evidence/: the paper's scales and schemes on Multi30k, small enough for two processor cores.

All rows train the small Transformer on 29,000 pairs of German and English image captions. evidence/README.md has the command
that prepares them as data-bin/multi30k.
"""

from __future__ import annotations

from common.tables.rows import Contrast, ContrastFigure, Program, Row, Table
from transformer_iwslt.config import TranslationConfig
from transformer_iwslt.rows import SCORE

SCALES = ("0", "0.5", "0.25")
# Clipping and momentum act on Frobenius decay but not on weight decay. If gradients have a norm of 1, clipping divides them by
# 10 and a momentum of 0.99 multiplies them by 100. So weight decay of 1e-3 shrinks a product of norm 1 like Frobenius decay of
# 1e-4.
WEIGHT_DECAY, FROBENIUS_DECAY = "1e-3", "1e-4"
# Products that either scheme may act on: those of factorized layers, of queries and keys, and of outputs and values.
PRODUCTS = ("", "-quekey", "-outval")
METHODS = {
    "regular": f"regular initialization, weight decay {WEIGHT_DECAY}",
    "spectral": f"spectral initialization of all products, weight decay {WEIGHT_DECAY}",
    "spectral+frobenius": f"spectral initialization and Frobenius decay {FROBENIUS_DECAY} of all products",
    "frobenius": f"regular initialization, Frobenius decay {FROBENIUS_DECAY} of all products",
    "norm-matched": f"regular layers at the norm of spectral ones, regular attention, weight decay {WEIGHT_DECAY}",
}
SCHEMES = ("regular", "spectral", "spectral+frobenius")
CONTROLS = ("frobenius", "norm-matched")  # at rank scale 0.5 only
# All gradients are clipped, so the learning rate and the bound determine the size of an update. Batches of 1,000 tokens instead
# of 4,000 allow more updates in the same time. The learning rate falls after 500 updates; a run here ends before the default
# 4,000.
_RECIPE = ("data-bin/multi30k", "--no-epoch-checkpoints", "--generate")
_RECIPE += ("--max-tokens", "1000", "--max-update", "1200", "--warmup-updates", "500")
_RECIPE += ("--smoothed-over", "others", "--batches", "once")  # these runs were made before these flags existed


def make_row(scale: str, method: str) -> Row:
    products = PRODUCTS if scale != "0" else PRODUCTS[1:]  # the full network has no factorized layers
    flags = [*_RECIPE, "--weight-decay", WEIGHT_DECAY]
    flags += ["--rank-scale", scale] if scale != "0" else []
    if method.startswith("spectral"):
        flags += [f"--spectral{product}" for product in products]
    if method.startswith("norm-matched"):
        flags += ["--init", "norm-matched"]
    if method.endswith("frobenius"):
        flags += ["--frobenius-decay", FROBENIUS_DECAY, *(f"--wd2fd{product}" for product in products)]
    model = "full" if scale == "0" else f"rank scale {scale}"
    return Row(f"{scale}-{method}", f"{model}: {METHODS[method]}", tuple(flags), seeds=(1, 2))


def translation() -> Table:
    rows = [make_row(scale, method) for scale in SCALES for method in SCHEMES]
    rows += [make_row("0.5", method) for method in CONTROLS]
    contrasts = []
    for scale in SCALES:
        model = "full" if scale == "0" else f"rank scale {scale}"
        contrasts.append(Contrast(f"{model}: spectral initialization", f"{scale}-spectral", f"{scale}-regular"))
        question = f"{model}: Frobenius decay, from a spectral start"
        contrasts.append(Contrast(question, f"{scale}-spectral+frobenius", f"{scale}-spectral"))
    for scale in SCALES[1:]:
        both = f"{scale}-spectral+frobenius"
        contrasts.append(Contrast(f"both schemes at rank scale {scale}", both, f"{scale}-regular"))
        contrasts.append(Contrast(f"both schemes at rank scale {scale} against the full network", both, "0-regular"))
    contrasts += [
        Contrast("rank scale 0.5: Frobenius decay, from a regular start", "0.5-frobenius", "0.5-regular"),
        Contrast("rank scale 0.5: spectral initialization, under Frobenius decay", "0.5-spectral+frobenius", "0.5-frobenius"),
        Contrast("rank scale 0.5: the scale of spectral layers alone", "0.5-norm-matched", "0.5-regular"),
        Contrast("rank scale 0.5: all but the scale of spectral layers", "0.5-spectral", "0.5-norm-matched"),
    ]
    title = "Translation of Multi30k, German to English: the small Transformer, 1,200 updates"
    return Table("evidence-multi30k", title, tuple(rows), (ContrastFigure(),), SCORE, tuple(contrasts))


PROGRAM = Program(
    TranslationConfig.program, {"train.py": TranslationConfig}, (translation(),), own_seeds=True, own_process=True
)
