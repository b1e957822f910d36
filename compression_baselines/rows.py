"""The rows of the compression tables: how each differs from a program's recipe, its number of parameters, and its cost."""

from __future__ import annotations

from dataclasses import replace

from common.tables.rows import Program, Published, Row, Table
from compression_baselines.config import PRUNERS, SPARSE, CompressionConfig, LowRankBudgetConfig, PruningConfig, SparseConfig

DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "tiny_imagenet": "TinyImageNet"}
METHODS = {
    "regular": ((), "regular initialization, weight decay"),
    "spectral": (("--spectral",), "spectral initialization, weight decay"),
    "frobenius": (("--wd2fd",), "regular initialization, Frobenius decay"),
    "spectral+frobenius": (("--spectral", "--wd2fd"), "spectral initialization, Frobenius decay"),
}

# Parameters by network, data set and target ratio; "0" is the full network.
PARAMETERS = {
    ("resnet32x64", "cifar10"): {"0": 7_427_914, "0.02": 150_090, "0.05": 373_194, "0.1": 743_370},
    ("resnet32x64", "cifar100"): {"0": 7_451_044, "0.02": 154_404, "0.05": 370_020, "0.1": 751_524},
    ("resnet32x64", "tiny_imagenet"): {"0": 7_476_744, "0.05": 380_360, "0.1": 754_760, "0.15": 1_117_448},
    ("resnet32x32", "cifar10"): {"0": 1_860_522, "0.02": 35_498, "0.05": 93_962, "0.1": 186_602},
    ("resnet32x32", "cifar100"): {"0": 1_872_132, "0.02": 39_620, "0.05": 90_404, "0.1": 188_804},
    ("resnet32x32", "tiny_imagenet"): {"0": 1_885_032, "0.05": 92_072, "0.1": 190_280, "0.15": 280_904},
    ("vgg19", "cifar10"): {"0": 20_035_018, "0.02": 397_642, "0.05": 992_650, "0.1": 1_996_618},
    ("vgg19", "cifar100"): {"0": 20_081_188, "0.02": 412_900, "0.05": 1_008_868, "0.1": 2_013_220},
    ("vgg19", "tiny_imagenet"): {"0": 20_132_488, "0.02": 410_440, "0.05": 1_005_448, "0.1": 2_011_144},
}
FLAGS = {
    "resnet32x64": ("--network", "resnet"),
    "resnet32x32": ("--network", "resnet", "--width", "32"),
    "vgg19": ("--network", "vgg"),
}
LABELS = {"resnet32x64": "ResNet32 [64, 128, 256]", "resnet32x32": "ResNet32 [32, 64, 128]", "vgg19": "VGG19"}
# GPU-hours of one seed on CIFAR and on TinyImageNet, as estimated in the released code; at width 32, a quarter of that.
HOURS = {"resnet32x64": (80 / 60, 10.5), "resnet32x32": (20 / 60, 2.6), "vgg19": (36 / 60, 200 / 60)}
FINE_TUNING = 150 / 200  # epochs of prune.py over those of train.py
ROUNDS = {"lottery": 5}
# --prune-ratio-limit of rows whose budget the default of 0.95 cannot reach: eigendirections and rotations would exceed it.
LIMITS = {
    ("resnet32x32", "cifar10", "0.02", "eigendamage"): "0.97",
    ("resnet32x32", "cifar100", "0.02", "eigendamage"): "0.97",
    ("resnet32x32", "cifar100", "0.02", "eigendamage-separable"): "0.97",
}

_QUOTED = "the paper's Table 1 as a secondary text quotes it, unchecked"
_GRASP = "GraSP's Table 2 as a secondary text quotes it: 160 epochs, weight decay 5e-4"
_GRANET = "run by the authors of GraNet, as a secondary text quotes it"
PUBLISHED = {
    ("resnet32x64", "cifar10", "0", "full"): Published(94.49, _QUOTED),
    ("resnet32x64", "cifar10", "0.1", "regular"): Published(93.59, _QUOTED),
    ("resnet32x64", "cifar10", "0.1", "spectral"): Published(92.52, _QUOTED),
    ("resnet32x64", "cifar10", "0.1", "frobenius"): Published(92.92, _QUOTED),
    ("resnet32x64", "cifar10", "0.1", "spectral+frobenius"): Published(94.34, _QUOTED),
    ("vgg19", "cifar10", "0", "full"): Published(94.23, _GRASP),
}
# Sparse VGG19 by data set and method: at 10, 5 and 2 %, None if no number is known.
_SPARSE_VGG: dict[tuple[str, str, str], tuple[float | None, float | None, float | None]] = {
    ("cifar10", "lottery", _GRASP): (93.51, 92.92, 92.34),
    ("cifar10", "snip", _GRASP): (93.63, 93.43, 92.05),
    ("cifar10", "grasp", _GRASP): (93.30, 93.04, 92.19),
    ("cifar10", "set", _GRASP): (92.46, None, None),
    ("cifar10", "rigl", _GRANET): (93.38, None, None),
    ("cifar10", "magnitude", _GRANET): (93.59, None, None),
    ("cifar10", "synflow", _GRANET): (93.35, None, None),
    ("cifar100", "lottery", _GRASP): (72.78, 71.44, 68.95),
    ("cifar100", "snip", _GRASP): (72.84, 71.83, 58.46),
    ("cifar100", "grasp", _GRASP): (71.95, 71.23, 68.90),
    ("cifar100", "rigl", _GRANET): (None, None, 69.82),
    ("cifar100", "magnitude", _GRANET): (None, None, 72.07),
    ("cifar100", "synflow", _GRANET): (None, None, 70.94),
}
for (_data, _method, _source), _values in _SPARSE_VGG.items():
    for _ratio, _value in zip(("0.1", "0.05", "0.02"), _values, strict=True):
        if _value is not None:
            PUBLISHED["vgg19", _data, _ratio, _method] = Published(_value, _source)


def make_rows(network: str) -> list[Row]:
    rows = []
    for data, name in DATA.items():
        hours = HOURS[network][data == "tiny_imagenet"]
        full = None
        for ratio, parameters in PARAMETERS[network, data].items():
            for method in (*METHODS, *PRUNERS, *SPARSE) if ratio != "0" else ("full",):
                flags, words = METHODS.get(method, (("--method", method), method))
                budget = ("--target-ratio", ratio) if ratio != "0" else ()
                share = f" at {float(ratio):.0%} of the parameters: {words}" if budget else ", full"
                row = Row(
                    id=f"{network}-{data}-{f'{ratio}-{method}' if budget else 'full'}",
                    label=f"{LABELS[network]} on {name}{share}",
                    flags=(*FLAGS[network], "--dataset", data, *budget, *(flags if budget else ())),
                    hours=hours,
                    parameters=parameters,
                    published=PUBLISHED.get((network, data, ratio, method)),
                    place=(f"{LABELS[network]} {method}", f"{name} {float(ratio):.0%}" if budget else f"{name} full"),
                )
                if method == "full":
                    full = row
                elif method in PRUNERS:
                    limit = LIMITS.get((network, data, ratio, method))
                    flags = ("--prune-ratio-limit", limit) if limit else ()
                    row = replace(
                        row,
                        script="prune.py",
                        flags=(*row.flags, *flags, "--pretrained", "{after}/checkpoint.pt"),
                        hours=hours * FINE_TUNING,
                        parameters=None,  # depends on the trained network; within a unit of the budget
                        after=full,
                    )
                elif method in SPARSE:
                    total = PARAMETERS[network, data]["0"]
                    row = replace(
                        row, script="sparse.py", hours=hours * ROUNDS.get(method, 1), parameters=round(float(ratio) * total)
                    )
                rows.append(row)
    return rows


CONFIGS = {"train.py": LowRankBudgetConfig, "prune.py": PruningConfig, "sparse.py": SparseConfig}
PROGRAM = Program(
    CompressionConfig.program,
    CONFIGS,
    (
        Table(
            "table1",
            "Low-rank training, pruning and sparse training at a budget (the paper's Table 1)",
            (*make_rows("resnet32x64"), *make_rows("vgg19")),
        ),
        Table("table1-width32", "The same for the ResNet32 of the sparse-training papers", tuple(make_rows("resnet32x32"))),
    ),
)
