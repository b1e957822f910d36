"""Sparse training: one file per method."""

from compression_baselines.masks.base import Method
from compression_baselines.masks.deepr import Deepr
from compression_baselines.masks.dsr import Dsr
from compression_baselines.masks.grasp import Grasp
from compression_baselines.masks.lottery import Lottery
from compression_baselines.masks.magnitude import Magnitude
from compression_baselines.masks.rigl import Rigl
from compression_baselines.masks.set import Set
from compression_baselines.masks.snip import Snip
from compression_baselines.masks.synflow import Synflow

METHODS: dict[str, type[Method]] = {
    "magnitude": Magnitude,
    "lottery": Lottery,
    "snip": Snip,
    "grasp": Grasp,
    "synflow": Synflow,
    "set": Set,
    "deepr": Deepr,
    "dsr": Dsr,
    "rigl": Rigl,
}
