"""The translation rows of evidence/: the scales and schemes of the paper on Multi30k, which two processor cores can run.

All train the small Transformer on 29,000 pairs of German and English image captions; evidence/README.md has the command that
prepares them as data-bin/multi30k.
"""

from __future__ import annotations

from common.tables.rows import Contrast, ContrastFigure, Program, Row, Table
from transformer_iwslt.config import TranslationConfig
from transformer_iwslt.rows import SCORE

SCALES = ("0", "0.5", "0.25")
# Weight decay stands outside of clipping and momentum, Frobenius decay within: where gradients have a norm of 1, clipping takes
# nine tenths and a momentum of 0.99 gives a hundredfold, so 1e-3 of the one shrinks a product of norm 1 like 1e-4 of the other.
WEIGHT_DECAY, FROBENIUS_DECAY = "1e-3", "1e-4"
_ALL = ("", "-quekey", "-outval")
METHODS = {
    "regular": ((), f"regular initialization, weight decay {WEIGHT_DECAY}"),
    "spectral": (_ALL, f"spectral initialization of all products, weight decay {WEIGHT_DECAY}"),
    "spectral+frobenius": (_ALL, f"spectral initialization and Frobenius decay {FROBENIUS_DECAY} of all products"),
}
# All gradients are clipped, so that rate and bound set how far an update goes: batches of 1,000 tokens in place of 4,000
# make more of them in the same time. The rate falls after 500 updates; that it does so after 4,000 would never be seen here.
_RECIPE = ("data-bin/multi30k", "--no-epoch-checkpoints", "--generate")
_RECIPE += ("--max-tokens", "1000", "--max-update", "1200", "--warmup-updates", "500")
_RECIPE += ("--smoothed-over", "others", "--batches", "once")  # these runs are from before there was a choice


def make_row(scale: str, method: str) -> Row:
    families, words = METHODS[method]
    if scale == "0":
        families = families[1:]  # the full network has no factorized layers
    flags = [*_RECIPE, "--weight-decay", WEIGHT_DECAY]
    flags += ["--rank-scale", scale] if scale != "0" else []
    flags += [f"--spectral{family}" for family in families]
    if method.endswith("frobenius"):
        flags += ["--frobenius-decay", FROBENIUS_DECAY, *(f"--wd2fd{family}" for family in families)]
    model = "full" if scale == "0" else f"rank scale {scale}"
    return Row(f"{scale}-{method}", f"{model}: {words}", tuple(flags), seeds=(1, 2))


def translation() -> Table:
    rows, contrasts = [make_row(scale, method) for scale in SCALES for method in METHODS], []
    for scale in SCALES:
        model = "full" if scale == "0" else f"rank scale {scale}"
        contrasts.append(Contrast(f"{model}: spectral initialization", f"{scale}-spectral", f"{scale}-regular"))
        question = f"{model}: Frobenius decay, from a spectral start"
        contrasts.append(Contrast(question, f"{scale}-spectral+frobenius", f"{scale}-spectral"))
    for scale in SCALES[1:]:
        both = f"{scale}-spectral+frobenius"
        contrasts.append(Contrast(f"both schemes at rank scale {scale}", both, f"{scale}-regular"))
        contrasts.append(Contrast(f"both schemes at rank scale {scale} against the full network", both, "0-regular"))
    title = "Translation of Multi30k, German to English: the small Transformer, 1,200 updates"
    return Table("evidence-multi30k", title, tuple(rows), (ContrastFigure(),), SCORE, tuple(contrasts))


PROGRAM = Program(
    TranslationConfig.program, {"train.py": TranslationConfig}, (translation(),), own_seeds=True, own_process=True
)
