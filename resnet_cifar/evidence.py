"""The ResNet rows of evidence/: the paper's claims at a scale that two processor cores can run, on real images.

They are apart from the rows of the paper's tables. All train ResNet20 on CIFAR-10 (JPEG), that is, CIFAR-10's 50,000 and 10,000
images stored as JPEG, in folders: give the scripts ``--data-dir IMAGES``, with a folder a class in train/ and test/.
"""

from __future__ import annotations

from common.tables.rows import Against, Curves, Program, Row, Table
from resnet_cifar.rows import METHODS, NAME, PARAMETERS, configure, network, scheme

SEEDS = (1, 2, 3)
# The learning rate and decay of all but evidence-schedule, which chose them on the full network.
LR, DECAY = "0.1", "5e-4"


def make_row(
    id: str,
    label: str,
    *flags: str,
    epochs: int,
    scale: str = "0",
    lr: str = LR,
    decay: str = DECAY,
    seeds: tuple[int, ...] = (1,),
) -> Row:
    """A row of ResNet20 with the recipe above; dense at scale 0."""
    words = ["--arch", "resnet20", "--data", "imagefolder", "--epochs", str(epochs), "--lr", lr, "--weight-decay", decay]
    if scale != "0":
        words += ["--rank-scale", scale]
    return Row(id, label, (*words, *flags), parameters=PARAMETERS[20]["deep" if "--square" in flags else scale], seeds=seeds)


def schedule() -> Table:
    rows = []
    for lr, decay in (("0.1", "1e-4"), ("0.1", "5e-4"), ("0.1", "2e-3"), ("0.3", "5e-4")):
        label = f"full, learning rate {lr}, weight decay {decay}"
        rows.append(make_row(f"full-{lr}-{decay}", label, epochs=5, lr=lr, decay=decay, seeds=(0,)))
    return Table(
        "evidence-schedule", "The schedule, chosen on the full network: ResNet20, 5 epochs, a seed of its own", tuple(rows)
    )


PROGRAM = Program(NAME, configure, (schedule(),))
