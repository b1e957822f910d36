"""The lines of docs/own-model.md, run as they are."""

import re

import pytest
import torch

import common
from common.experiments.files import ROOT
from common.layers import Factorized

BLOCKS = re.findall(r"## (.+?)\n.*?```python\n(.*?)```", (ROOT / "docs/own-model.md").read_text(), re.DOTALL)
NEEDS = {"A ViT": "timm", "GPT-2": "transformers", "ResNet50": "torchvision"}


def test_each_network_has_its_lines():
    assert [title for title, _ in BLOCKS] == list(NEEDS)


@pytest.mark.filterwarnings("error:.* layers have more parameters than before")
@pytest.mark.parametrize(
    ("title", "lines"), [pytest.param(*block, marks=[pytest.mark.slow] * (block[0] == "ResNet50")) for block in BLOCKS]
)
def test_the_lines_run(title, lines):
    pytest.importorskip(NEEDS[title])
    torch.manual_seed(0)
    scope = {}
    exec(lines.replace("from fnl import", "from common import"), scope)  # this process has the library under its other name
    assert len(lines.strip().splitlines()) <= 15
    report = scope["report"]
    assert report.ratio < 0.6
    if title == "ResNet50":
        assert report.ratio == pytest.approx(1 / 3, abs=0.005)
    if title == "GPT-2":
        assert {"transformer.wte", "lm_head", "transformer.h.0.attn.c_attn"} <= {layer.name for layer in report.layers}
        assert scope["model"].lm_head.weight is scope["model"].transformer.wte.weight
    assert not any(isinstance(module, Factorized) for module in scope["model"].modules())
    assert all(parameter.isfinite().all() for parameter in scope["model"].parameters())
    assert common.FrobeniusDecay is scope["FrobeniusDecay"]
