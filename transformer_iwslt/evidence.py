"""The translation rows of evidence/: the scales and schemes of the paper on Multi30k, which two processor cores can run.

All train the small Transformer on 29,000 pairs of German and English image captions; evidence/README.md has the command that
prepares them as data-bin/multi30k.
"""

from __future__ import annotations

from common.tables.rows import Contrast, Differences, Program, Row, Table
from transformer_iwslt.rows import NAME, SCORE, configure

SCALES = ("0", "0.5", "0.25")
METHODS = {
    "regular": ((), "regular initialization, weight decay"),
    "spectral": (("", "-quekey", "-outval"), "spectral initialization of all products, weight decay"),
    "spectral+frobenius": (("", "-quekey", "-outval"), "spectral initialization and Frobenius decay of all products"),
}
# All updates are clipped, so that each is one step, of a length that rate and bound alone set. Batches of 1,000 tokens in place
# of 4,000 take more steps in the same time; the paper's warm-up of 4,000 updates would outlast them.
_RECIPE = ("data-bin/multi30k", "--no-epoch-checkpoints", "--generate", "--weight-decay", "1e-3")
_RECIPE += ("--max-tokens", "1000", "--max-update", "2000", "--warmup-updates", "500")


def make_row(scale: str, method: str) -> Row:
    families, words = METHODS[method]
    if scale == "0":
        families = families[1:]  # the full network has no factorized layers
    flags = [*_RECIPE, *(("--rank-scale", scale) if scale != "0" else ())]
    flags += [f"--spectral{family}" for family in families]
    if method.endswith("frobenius"):
        flags += ["--frobenius-decay", "1e-4", *(f"--wd2fd{family}" for family in families)]
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
    title = "Translation of Multi30k, German to English: the small Transformer, 2,000 updates"
    return Table("evidence-multi30k", title, tuple(rows), (Differences(),), SCORE, tuple(contrasts))


PROGRAM = Program(NAME, configure, (translation(),), own_seeds=True)
