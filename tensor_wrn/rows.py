"""The rows of the tensor table: how each differs from the recipe of train.py, its number of parameters, and its cost."""

from __future__ import annotations

from common.tables.rows import Program, Row, Table
from tensor_wrn.config import WideResNetConfig

RECIPE = ("cifar10", "teacher", "--wrn-depth", "28", "--wrn-width", "10")
INITS = {"regular": (), "spectral": ("--spectral",)}
DECAYS = {
    "plain": (("--nocrswd",), "weight decay"),
    "crs": ((), "weight decay scaled by the compression"),
    "frobenius": (("--wd2fd",), "Frobenius decay"),
}
NO_DECAY = {"none": (("--wd2fd", "--no-frob"), "no decay on the cores")}
# For each form, the flags of its two budgets and their numbers of parameters.
BUDGETS = {
    "Conv": {"0.01667": (("--target-ratio", "0.01667"), 610_282), "0.06667": (("--target-ratio", "0.06667"), 2_435_034)},
    "TensorTrain": {"0.234": (("--conv", "TensorTrain_0.234"), 607_160), "0.705": (("--conv", "TensorTrain_0.705"), 2_434_702)},
    "TuckerTT": {"0.211": (("--conv", "TuckerTT_0.211"), 608_501), "0.68": (("--conv", "TuckerTT_0.68"), 2_444_223)},
    "Tucker": {
        "0.01667": (("--conv", "Tucker", "--target-ratio", "0.01667"), 608_708),
        "0.06667": (("--conv", "Tucker", "--target-ratio", "0.06667"), 2_415_489),
    },
}
SHARES = ("1.667 %", "6.667 %")
HOURS, FULL_HOURS = 3.0, 4.5  # GPU-hours of one seed, as the authors of the released code estimate them


def make_row(form: str, index: int, init: str, init_flags: tuple[str, ...], decay: str) -> Row:
    budget, (flags, parameters) = list(BUDGETS[form].items())[index]
    decay_flags, words = (DECAYS | NO_DECAY)[decay]
    return Row(
        id=f"{form}-{budget}-{init}-{decay}",
        label=f"WideResNet28-10 on CIFAR-10, {form} at {SHARES[index]} of the parameters: {init} initialization, {words}",
        flags=(*RECIPE, *flags, *init_flags, *decay_flags),
        hours=HOURS,
        parameters=parameters,
        place=(f"{form}, {init}, {decay}", SHARES[index]),
    )


def table2() -> Table:
    """The released code's 37 settings, its Tucker as TuckerTT, and the same for a Tucker without redundant parameters."""
    full = Row("full", "WideResNet28-10 on CIFAR-10, full", RECIPE, FULL_HOURS, 36_479_194, place=("full", SHARES[0]))
    cells = [(form, index, init, decay) for form in BUDGETS for index in (0, 1) for init in INITS for decay in DECAYS]
    rows = [make_row(form, index, init, INITS[init], decay) for form, index, init, decay in cells]
    return Table("table2", "Low-rank and tensor factorizations (the paper's Table 2)", (full, *rows))


def controls() -> Table:
    """Controls for the schemes' side effects: norm-matched cores, and the released code's initialization and lack of decay."""
    rows = []
    for form in BUDGETS:
        for index in (0, 1):
            rows += [make_row(form, index, "norm-matched", ("--init", "norm-matched"), decay) for decay in DECAYS]
            if form != "Conv":
                rows += [make_row(form, index, init, flags, "none") for init, flags in INITS.items()]
                rows += [make_row(form, index, "released", ("--init", "released"), decay) for decay in (*DECAYS, "none")]
    return Table("table2-controls", "Controls of the tensor table, and what the released code computes", tuple(rows))


PROGRAM = Program(WideResNetConfig.program, {"train.py": WideResNetConfig}, (table2(), controls()))
