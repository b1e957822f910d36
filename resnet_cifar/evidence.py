"""The ResNet rows of evidence/: the paper's claims at a scale that two processor cores can run, on real images.

They are separate from the rows of the paper's tables. All train ResNet20 on CIFAR-10 (JPEG): CIFAR-10's 50,000 training and
10,000 test images, stored as JPEG files. Give their scripts ``--data-dir IMAGES``, a folder that has train/ and test/ with one
folder per class.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from common.tables.rows import Contrast, ContrastFigure, CurveFigure, Program, Row, SweepFigure, Table
from resnet_cifar.config import ResNetConfig
from resnet_cifar.rows import HOURS, METHODS, PARAMETERS, scheme

# Learning rate and decay, as evidence-schedule chose them on the full network; evidence-decay varies the decay.
LR, DECAY = "0.1", "2e-3"


# The questions that the rows of both schemes answer.
SCHEME_CONTRASTS = (
    Contrast("spectral initialization, under weight decay", "spectral", "regular"),
    Contrast("its scale alone, under weight decay", "norm-matched", "regular"),
    Contrast("all but its scale (directions, spectrum, balance)", "spectral", "norm-matched"),
    Contrast("spectral initialization, under Frobenius decay", "spectral+frobenius", "frobenius"),
    Contrast("its scale alone, under Frobenius decay", "norm-matched+frobenius", "frobenius"),
    Contrast("all but its scale, under Frobenius decay", "spectral+frobenius", "norm-matched+frobenius"),
    Contrast("Frobenius decay, from a regular start", "frobenius", "regular"),
    Contrast("Frobenius decay, from a norm-matched start", "norm-matched+frobenius", "norm-matched"),
    Contrast("Frobenius decay, from a spectral start", "spectral+frobenius", "spectral"),
    Contrast("both schemes", "spectral+frobenius", "regular"),
    Contrast("what is left to the full network", "spectral+frobenius", "full"),
)


def make_row(
    id: str,
    label: str,
    *flags: str,
    epochs: int = 5,
    scale: str = "0",
    lr: str = LR,
    decay: str = DECAY,
    seeds: tuple[int, ...] = (1,),
    after: Row | None = None,
) -> Row:
    """A row of ResNet20; dense at scale 0."""
    words = ["--arch", "resnet20", "--data", "imagefolder", "--epochs", str(epochs), "--lr", lr, "--weight-decay", decay]
    if scale != "0":
        words += ["--rank-scale", scale]
    parameters = PARAMETERS[20]["deep" if "--square" in flags else scale]
    return Row(id, label, (*words, *flags), HOURS[20] * epochs / 200, parameters, seeds=seeds, after=after)


def schedule() -> Table:
    rows = []
    for lr, decay in (("0.1", "1e-4"), ("0.1", "5e-4"), ("0.1", "2e-3"), ("0.3", "5e-4")):
        label = f"full, learning rate {lr}, weight decay {decay}"
        rows.append(make_row(f"full-{lr}-{decay}", label, lr=lr, decay=decay, seeds=(0,)))
    return Table(
        "evidence-schedule", "The recipe, chosen on the full network: ResNet20, 5 epochs, a seed of its own", tuple(rows)
    )


def schemes() -> Table:
    rows = [make_row("full", "full", epochs=10, seeds=(1, 2, 3))]
    for method in METHODS:
        flags, words = METHODS[method]
        close = method in ("regular", "norm-matched", "spectral")  # differ by less than two standard errors at three seeds
        seeds = (1, 2, 3, 4, 5) if close else (1, 2, 3)
        rows.append(make_row(method, f"rank scale 0.111: {words}", *flags, epochs=10, scale="0.111", seeds=seeds))
    return Table(
        "evidence-schemes",
        "Both schemes at a quarter of the parameters: ResNet20 at rank scale 1/9, 10 epochs",
        tuple(rows),
        (ContrastFigure(), CurveFigure("curves", ("test_accuracy", "nuclear_norm/nuclear_norm_bound"))),
        contrasts=SCHEME_CONTRASTS,
    )


def papers_decay(id: str, title: str, epochs: int, methods: Collection[str]) -> Table:
    """Rows of both schemes at the paper's decay of 1e-4, which is a twentieth of the decay in evidence-schemes."""
    row = partial(make_row, epochs=epochs, decay="1e-4", seeds=(1, 2, 3))
    rows = [row("full", "full", "--amp", "bf16")]
    for method in methods:
        flags, words = METHODS[method]
        rows.append(row(method, f"rank scale 0.111: {words}", "--amp", "bf16", *flags, scale="0.111"))
    contrasts = tuple(each for each in SCHEME_CONTRASTS if {each.row, each.base} <= {"full", *methods})
    figures = (ContrastFigure(), CurveFigure("curves", ("test_accuracy", "nuclear_norm/nuclear_norm_bound")))
    return Table(id, f"{title}: ResNet20 at rank scale 1/9, {epochs} epochs, 1e-4", tuple(rows), figures, contrasts=contrasts)


def paper_decay() -> Table:
    """At a length that a processor core trains in 37 minutes. evidence-paper-schedule is the same at full length."""
    methods = ("regular", "spectral", "frobenius", "spectral+frobenius", "norm-matched+frobenius")
    return papers_decay("evidence-paper-decay", "Both schemes at the paper's decay", 30, methods)


def paper_schedule() -> Table:
    """At the paper's length as well, for a GPU."""
    return papers_decay("evidence-paper-schedule", "Both schemes at the paper's length and decay", 200, METHODS)


def normalization() -> Table:
    replay = ("--no-frob", "--normalize", "{after}/frobnorms.tensor")
    rows, contrasts = [], []
    for init in ("regular", "spectral"):
        flags, start = METHODS[init][0], f"{init} start"
        none = make_row(f"{init}-none", f"{start}: no decay on the factors", *flags, "--no-frob", scale="0.111")
        frobenius = make_row(
            f"{init}-frobenius", f"{start}: Frobenius decay", *flags, "--wd2fd", "--dump-frobnorms", scale="0.111"
        )
        label = f"{start}: no decay, norms of the Frobenius run replayed"
        normalized = make_row(f"{init}-normalized", label, *flags, *replay, scale="0.111", after=frobenius)
        rows += [none, frobenius, normalized]
        contrasts += [
            Contrast(f"{start}: Frobenius decay against none", frobenius.id, none.id),
            Contrast(f"{start}: its norms alone against none", normalized.id, none.id),
            Contrast(f"{start}: Frobenius decay beyond its norms", frobenius.id, normalized.id),
        ]
    return Table(
        "evidence-normalization",
        "What Frobenius decay does beyond keeping norms small: ResNet20 at rank scale 1/9, 5 epochs",
        tuple(rows),
        (CurveFigure("norms", ("test_accuracy", "frobenius_norm", "nuclear_norm/nuclear_norm_bound")),),
        contrasts=tuple(contrasts),
    )


def decay_sweep() -> Table:
    rows, contrasts = [], []
    for decay in ("1e-4", "5e-4", "2e-3", "1e-2"):
        for method in ("regular", "frobenius"):
            flags, words = METHODS[method]
            rows.append(make_row(f"{decay}-{method}", f"strength {decay}: {words}", *flags, scale="0.111", decay=decay))
        contrasts.append(Contrast(f"Frobenius against weight decay of {decay}", f"{decay}-frobenius", f"{decay}-regular"))
    return Table(
        "evidence-decay",
        "Accuracy against the strength of either decay: ResNet20 at rank scale 1/9, 5 epochs",
        tuple(rows),
        (SweepFigure("accuracy-decay", "weight_decay", scheme, lambda _: "ResNet20, rank scale 1/9"),),
        contrasts=tuple(contrasts),
    )


def rank() -> Table:
    rows, contrasts = [], []
    for scale in ("0.037", "0.111", "0.333"):
        for method in ("regular", "spectral", "spectral+frobenius"):
            flags, words = METHODS[method]
            rows.append(make_row(f"{scale}-{method}", f"rank scale {scale}: {words}", *flags, scale=scale))
        both = f"{scale}-spectral+frobenius"
        contrasts += [
            Contrast(f"spectral initialization at rank scale {scale}", f"{scale}-spectral", f"{scale}-regular"),
            Contrast(f"Frobenius decay at rank scale {scale}, from a spectral start", both, f"{scale}-spectral"),
            Contrast(f"both schemes at rank scale {scale}", both, f"{scale}-regular"),
        ]
    return Table(
        "evidence-rank",
        "Accuracy against rank: ResNet20, 5 epochs",
        tuple(rows),
        (SweepFigure("accuracy-rank", "rank_scale", scheme, lambda _: "ResNet20"),),
        contrasts=tuple(contrasts),
    )


def overcomplete() -> Table:
    rows, contrasts = [make_row("full", "full")], []
    for scale, kind, words, more in (
        ("1", "full-rank", "full rank (scale 1)", ()),
        ("1", "deep", "deep (three factors, scale 1)", ("--square",)),
        ("3", "wide", "wide (scale 3)", ()),
    ):
        for method in ("regular", "frobenius"):
            flags, decay = METHODS[method]
            rows.append(make_row(f"{kind}-{method}", f"{words}: {decay}", *more, *flags, "--densify", scale=scale))
        contrasts += [
            Contrast(f"{words}: Frobenius against weight decay", f"{kind}-frobenius", f"{kind}-regular"),
            Contrast(f"{words}, weight decay, against full", f"{kind}-regular", "full"),
            Contrast(f"{words}, Frobenius decay, against full", f"{kind}-frobenius", "full"),
        ]
    title = "Overcomplete training: ResNet20, 5 epochs; folded, all have the size of the full network"
    return Table("evidence-overcomplete", title, tuple(rows), (ContrastFigure(),), contrasts=tuple(contrasts))


PROGRAM = Program(
    ResNetConfig.program,
    {"train.py": ResNetConfig},
    (schedule(), schemes(), paper_decay(), paper_schedule(), normalization(), decay_sweep(), rank(), overcomplete()),
    own_seeds=True,
)
