"""The ResNet rows: how each differs from the recipe of train.py, its number of parameters, and its cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.tables.rows import CurveFigure, Program, Published, Row, SweepFigure, Table
from resnet_cifar.config import ResNetConfig

DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
HOURS = {20: 50 / 60, 32: 1.0, 44: 80 / 60, 56: 1.5, 110: 3.0}  # GPU-hours of one seed, as estimated in the released code
METHODS = {
    "regular": ((), "regular initialization, weight decay"),
    "spectral": (("--spectral",), "spectral initialization, weight decay"),
    "frobenius": (("--wd2fd",), "regular initialization, Frobenius decay"),
    "spectral+frobenius": (("--spectral", "--wd2fd"), "spectral initialization, Frobenius decay"),
    "norm-matched": (("--init", "norm-matched"), "regular initialization at the norm of the spectral one, weight decay"),
    "norm-matched+frobenius": (
        ("--init", "norm-matched", "--wd2fd"),
        "regular initialization at the norm of the spectral one, Frobenius decay",
    ),
}
SCHEMES = ("regular", "spectral", "frobenius", "spectral+frobenius")
CONTROLS = ("norm-matched", "norm-matched+frobenius")

# Parameters with 10 classes, by depth and rank scale; "deep" is rank scale 1 with three factors. 100 classes add 5,850.
PARAMETERS: dict[int, dict[str, int]] = {
    20: {
        "0": 269_722, "0.037": 23_482, "0.111": 63_850, "0.333": 188_314,
        "1": 560_026, "3": 1_675_162, "deep": 850_330,
    },
    32: {
        "0": 464_154, "0.037": 38_970, "0.111": 107_370, "0.333": 318_234,
        "1": 947_994, "3": 2_837_274, "9": 8_505_114, "deep": 1_431_834,
    },
    44: {"0": 658_586},
    56: {
        "0": 853_018, "0.037": 69_946, "0.111": 194_410, "0.333": 578_074,
        "1": 1_723_930, "3": 5_161_498, "9": 15_474_202, "deep": 2_594_842,
    },
    110: {
        "0": 1_727_962, "0.037": 139_642, "0.111": 390_250, "0.333": 1_162_714,
        "1": 3_469_786, "3": 10_391_002, "9": 31_154_650, "deep": 5_211_610,
    },
}  # fmt: skip

# Test accuracy of full networks on CIFAR-10, from the code base on which the released code builds.
_IDELBAYEV = "README of akamaster/pytorch_resnet_cifar10, not the paper"
FULL_ACCURACY = {20: 91.73, 32: 92.63, 44: 93.10, 56: 93.39, 110: 93.68}


def make_row(
    id: str,
    label: str,
    *flags: str,
    depth: int,
    data: str = "cifar10",
    scale: str = "0",
    deep: bool = False,
    after: Row | None = None,
    place: tuple[str, str] | None = None,
    published: Published | None = None,
) -> Row:
    """A row of one network and data set; dense at scale 0."""
    words = ["--arch", f"resnet{depth}", "--data", data]
    if scale != "0":
        words += ["--rank-scale", scale]
    if deep:
        words += ["--square"]
    key = "deep" if deep else scale
    if key not in PARAMETERS[depth]:
        raise ValueError(
            f"row {id!r}: PARAMETERS has no count for depth {depth} at {key}: --dry-run of the row's flags prints it"
        )
    parameters = PARAMETERS[depth][key] + (5850 if data == "cifar100" else 0)
    return Row(
        id=f"resnet{depth}-{data}{id}",
        label=f"ResNet{depth} on {DATA[data]}{label}",
        flags=(*words, *flags),
        hours=HOURS[depth],
        parameters=parameters,
        published=published,
        after=after,
        place=place,
    )


def full() -> Table:
    rows = []
    for data in DATA:
        for depth in (20, 32, 44, 56, 110):
            known = Published(FULL_ACCURACY[depth], _IDELBAYEV) if data == "cifar10" else None
            rows.append(make_row("-full", ", full", depth=depth, data=data, published=known))
    return Table("full", "Full networks, the baselines of every ResNet table and figure", tuple(rows))


def low_rank() -> Table:
    rows = []
    for data in DATA:
        for depth in (32, 56, 110):
            for scale in ("0.037", "0.111", "0.333"):
                for method in SCHEMES + CONTROLS:
                    flags, words = METHODS[method]
                    label = f" at rank scale {scale}: {words}"
                    place = (f"{scale} {method}", f"ResNet{depth} {DATA[data]}")
                    rows.append(make_row(f"-{scale}-{method}", label, *flags, depth=depth, data=data, scale=scale, place=place))
    title = "Low-rank ResNets at rank scales 1/27, 1/9 and 1/3, with norm-matched controls"
    return Table("low-rank", title, tuple(rows), (SweepFigure("accuracy-rank", "rank_scale", scheme, network),))


def overcomplete() -> Table:
    kinds = [
        ("1", "full-rank", False, ", full rank (scale 1)", SCHEMES),
        ("1", "deep", True, ", deep (three factors, scale 1)", SCHEMES),
        ("3", "wide3", False, ", wide (scale 3)", ("regular", "frobenius")),
        ("9", "wide9", False, ", wide (scale 9)", ("regular", "frobenius")),
    ]
    rows = []
    for data in DATA:
        for depth in (32, 56, 110):
            for scale, kind, deep, words, methods in kinds:
                for method in methods:
                    flags, scheme = METHODS[method]
                    label = f"{words}: {scheme}"
                    place = (f"{kind} {method}", f"ResNet{depth} {DATA[data]}")
                    id = f"-{kind}-{method}"
                    rows.append(make_row(id, label, *flags, depth=depth, data=data, scale=scale, deep=deep, place=place))
    return Table("overcomplete", "Overcomplete training (the paper's Table 3)", tuple(rows))


def decay_sweep() -> Table:
    rows = []
    for decay in ("5e-6", "1e-5", "5e-5", "1e-4", "5e-4", "1e-3", "5e-3"):
        # The released code omits 1e-4, since Frobenius decay of that strength is also a run of the normalization figure.
        for method in ("regular", "frobenius"):
            flags, words = METHODS[method]
            label = f" at rank scale 0.111, strength {decay}: {words}"
            flags = ("--weight-decay", decay, *flags)
            rows.append(make_row(f"-0.111-{decay}-{method}", label, *flags, depth=20, scale="0.111"))
    title = "Accuracy against the strength of weight decay and of Frobenius decay"
    return Table("decay-sweep", title, tuple(rows), (SweepFigure("accuracy-decay", "weight_decay", scheme, network),))


def normalization() -> Table:
    replay = ("--no-frob", "--normalize", "{after}/frobnorms.tensor")
    rows = []
    for init in ("regular", "spectral"):
        flags, words = METHODS[init][0], f" at rank scale 0.111, {init} initialization"
        frobenius: Row | None = None
        for kind, label, more in (
            ("none", "no decay on the factors", ("--no-frob",)),
            ("frobenius", "Frobenius decay", ("--wd2fd", "--dump-frobnorms")),
            ("normalized", "no decay, norms of the Frobenius run replayed", replay),
        ):
            after = frobenius if kind == "normalized" else None
            row = make_row(f"-0.111-{init}-{kind}", f"{words}: {label}", *flags, *more, depth=20, scale="0.111", after=after)
            frobenius = row if kind == "frobenius" else frobenius
            rows.append(row)
    figure = CurveFigure("norms", ("test_accuracy", "frobenius_norm", "nuclear_norm/nuclear_norm_bound"))
    return Table("normalization", "What Frobenius decay does beyond keeping norms small (figure 1)", tuple(rows), (figure,))


def quickstart() -> Table:
    recipe = ("--data", "digits", "--arch", "resnet20", "--epochs", "20", "--batch-size", "64")
    rows = [Row("full", "ResNet20 on 8x8 digits, full", recipe, parameters=269_722)]
    for method in ("regular", "norm-matched", "spectral", "frobenius", "spectral+frobenius"):
        flags, words = METHODS[method]
        label = f"ResNet20 on 8x8 digits at rank scale 0.037: {words}"
        rows.append(Row(method, label, (*recipe, "--rank-scale", "0.037", *flags), parameters=23_482))
    title = "Quickstart: every scheme on the embedded digits, minutes on a laptop"
    return Table("quickstart", title, tuple(rows), (CurveFigure("curves"),))


def scheme(config: Mapping[str, Any]) -> str:
    """The line of a figure that a configuration belongs to."""
    decay = "no decay" if config["no_frob"] else "Frobenius decay" if config["wd2fd"] else "weight decay"
    return f"{config['init']}, {decay}"


def network(config: Mapping[str, Any]) -> str:
    """The panel of a figure that a configuration belongs to."""
    return f"{config['arch']} on {DATA.get(config['data'], config['data'])}"


PROGRAM = Program(
    ResNetConfig.program,
    {"train.py": ResNetConfig},
    (full(), low_rank(), overcomplete(), decay_sweep(), normalization(), quickstart()),
)
