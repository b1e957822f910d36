"""Generated input: command lines of every program, and the layers, surgery and decay over shapes, types and layouts."""

import argparse
import contextlib
import copy
import importlib
import io
import json
import os
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from common import (
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedEmbedding,
    FactorizedLinear,
    FrobeniusDecay,
    LowRankConfig,
    densify_,
    factorize_,
    load_factorized_,
    param_groups,
)
from common.experiments import checkpoints
from compression_baselines.models import ResNet

# Command lines

SMALL = "--network resnet --depth 8 --data digits"
TINY = "--embed-dim 16 --ffn-dim 24 --layers 1 --heads 2 --cpu"
# What parses, and flags that keep the networks small unless others follow; None where there is no --dry-run.
PROGRAMS = {
    "resnet_cifar.train": ("resnet_cifar.config.ResNetConfig", "--arch resnet20 --data digits"),
    "compression_baselines.train": ("compression_baselines.config.LowRankBudgetConfig", SMALL),
    "compression_baselines.prune": (
        "compression_baselines.config.PruningConfig",
        f"{SMALL} --method kron-obd --target-ratio 0.5",
    ),
    "compression_baselines.sparse": ("compression_baselines.config.SparseConfig", f"{SMALL} --method rigl --target-ratio 0.3"),
    "tensor_wrn.train": ("tensor_wrn.config.WideResNetConfig", "digits teacher --wrn-depth 10 --wrn-width 1"),
    "transformer_iwslt.train": ("transformer_iwslt.config.TranslationConfig", TINY),
    "transformer_iwslt.prepare": ("transformer_iwslt.config.parse_prepare", None),
    "transformer_iwslt.generate": ("transformer_iwslt.config.parse_generate", None),
    "transformer_iwslt.translate": ("transformer_iwslt.config.parse_translate", None),
    "bert_pretraining.train": ("bert_pretraining.config.PretrainingConfig", "--embed-dim 16 --layers 1 --heads 2"),
    "bert_pretraining.prepare": ("bert_pretraining.prepare.parse_prepare", None),
    "bert_pretraining.finetune": ("bert_pretraining.downstream.FinetuneConfig", None),
    "bert_pretraining.blimp": ("bert_pretraining.downstream.BlimpConfig", None),
}
NEEDED = {  # flags that must be given, of programs without --dry-run
    "bert_pretraining.prepare": "--corpus numbers",
    "bert_pretraining.finetune": "--init-from x --task squad --train x --dev x",
    "bert_pretraining.blimp": "--init-from x --data x",
}
HOSTILE = [
    "", " ", "-1", "0", "1", "0.5", "3", "1e-3", "1e308", "1e400", "nan", "-inf", "9223372036854775808", "abc", "None", "--",
    "é💥", "a\nb", "\x00", "$(touch pwned)", "../..", "/dev/null", "/nonexistent/x", "1,2", "[1", "(0.9, 0.98)",
]  # fmt: skip
LARGE = ("resnet110", "resnet1202", "vgg")  # take long to build, and are built alike


class Found(Exception):
    pass


def reader_of(name):
    """The function that reads a command line: that of a configuration, or itself."""
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    return getattr(found, "parse", found)


def parser_of(name):
    """The parser that a function parses with."""

    def find(self, *args, **kwargs):
        raise Found(self)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", find):
        try:
            reader_of(name)([])
        except Found as found:
            return found.args[0]


@st.composite
def command_lines(draw, parser):
    """Some flags of a parser in any order, with values of their kind, at their limits, or of another kind."""
    words = []
    for action in draw(st.lists(st.sampled_from(parser._actions), max_size=6)):
        if isinstance(action, argparse._HelpAction):
            continue
        likely = [str(choice) for choice in action.choices or [action.default or 1] if choice not in LARGE]
        value = draw(st.sampled_from(HOSTILE if draw(st.integers(0, 3)) == 0 else likely))
        if not action.option_strings:
            words.append(value)
            continue
        flag = draw(st.sampled_from(action.option_strings))
        if action.nargs == 0:
            words.append(flag)
        else:
            words += [f"{flag}={value}"] if flag.startswith("--") and draw(st.booleans()) else [flag, value]
    return words


def check(program, words):
    """Run a command line: it starts, or ends with exit status 2 and one line."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        parse, small = PROGRAMS[program]
        status = 0
        try:
            if small is None:
                reader_of(parse)(words)
            else:
                importlib.import_module(program).main(words)
                json.loads(output.getvalue())
        except SystemExit as stop:
            status = stop.code
    lines = errors.getvalue().splitlines()
    if status:
        assert status == 2, (words, status)
        assert len([line for line in lines if not line.startswith("warning:")]) == 1, (words, lines)
        assert "error: " in lines[-1], (words, lines)
    return "refused" if status else "started"


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    from transformer_iwslt import prepare

    folder = tmp_path_factory.mktemp("data") / "numbers"
    prepare.main(f"--corpus numbers --size 200 --bpe 60 --dest {folder}".split())
    return folder


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    from bert_pretraining import prepare

    folder = tmp_path_factory.mktemp("data") / "sentences"
    prepare.main(f"--corpus numbers --lines 200 --words 300 --dest {folder}".split())
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "dense.pt"
    checkpoints.save_file(path, {"model": ResNet(8, 64, 10).state_dict()})
    return path


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("examples", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_any_command_line_starts_or_is_refused_in_one_line(program, examples, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parse, small = PROGRAMS[program]
    if program == "transformer_iwslt.train":
        small = f"{request.getfixturevalue('numbers')} {small}"
    if program == "bert_pretraining.train":
        small = f"{request.getfixturevalue('sentences')} {small}"
    if program == "compression_baselines.prune":
        small = f"{small} --pretrained {request.getfixturevalue('dense')}"
    first = NEEDED.get(program, "").split() if small is None else ["--dry-run", *small.split()]
    counts = {"started": 0, "refused": 0}

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(command_lines(parser_of(parse)))
    def run(words):
        counts[check(program, first + words)] += 1

    run()
    print(f"{program}: {counts}")
    assert counts["refused"]
    assert counts["started"]
    assert os.listdir(tmp_path) == []


# The public functions

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
pytestmark = pytest.mark.filterwarnings("ignore:.* layers have more parameters than before")
fuzzed = settings(max_examples=40, deadline=None, derandomize=True)


def assert_like_dense(layer, input, dtype):
    """Values and shape as the ordinary layer's of the same weight, whatever the layout of the input."""
    expected = layer.to_layer()(input)
    found = layer(input)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.15}[dtype]
    if found.numel():
        scale = expected.abs().max().clamp_min(1).item()
        torch.testing.assert_close(found / scale, expected / scale, atol=tolerance, rtol=0)


@fuzzed
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.sampled_from([2, 3]), DTYPES, st.booleans(), st.data())
def test_linear_of_any_shape(inputs, outputs, rank, depth, dtype, bias, data):
    torch.manual_seed(0)
    layer = FactorizedLinear(inputs, outputs, rank, bias, depth=depth, dtype=dtype)
    leading = data.draw(st.lists(st.integers(0, 3), max_size=3))
    input = torch.randn(*leading, inputs, dtype=dtype)
    if data.draw(st.booleans()):  # not contiguous
        input = torch.randn(*leading, 2 * inputs, dtype=dtype)[..., ::2]
    assert_like_dense(layer, input, dtype)


@fuzzed
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([(1, 1), (3, 3), (1, 3), (2, 3)]), st.integers(1, 9), DTYPES,
       st.integers(1, 2), st.integers(0, 2), st.integers(0, 3), st.sampled_from(["first", "last", "slices"]))  # fmt: skip
def test_convolution_of_any_shape(inputs, outputs, kernel, rank, dtype, stride, padding, batch, layout):
    torch.manual_seed(0)
    layer = FactorizedConv2d(inputs, outputs, kernel, rank, stride, padding, dtype=dtype)
    input = torch.randn(batch, inputs, 7, 6, dtype=dtype)
    if layout == "last":
        input = input.to(memory_format=torch.channels_last)
    elif layout == "slices":
        input = torch.randn(batch, inputs, 7, 12, dtype=dtype)[..., ::2]
    assert_like_dense(layer, input, dtype)


@fuzzed
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.lists(st.integers(0, 2), max_size=2), DTYPES, st.booleans())
def test_embedding_of_any_shape(words, size, rank, shape, dtype, padded):
    torch.manual_seed(0)
    layer = FactorizedEmbedding(words, size, rank, 0 if padded else None, dtype=dtype)
    assert_like_dense(layer, torch.randint(0, words, tuple(shape)), dtype)


def model(dtype, frozen):
    made = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)
    made[0].weight.requires_grad_(not frozen)
    return made


@fuzzed
@given(st.sampled_from([torch.float32, torch.float64]), st.booleans(), st.floats(0.05, 3), st.sampled_from([2, 3]),
       st.sampled_from(["spectral", "kaiming", "norm-matched"]), st.booleans())  # fmt: skip
def test_surgery_of_any_setting(dtype, frozen, scale, depth, init, channels_last):
    """Factorized, copied, saved and loaded, folded: one function throughout, and frozen weights stay frozen."""
    torch.manual_seed(0)
    made = model(dtype, frozen)
    if channels_last:
        made = made.to(memory_format=torch.channels_last)
    factorize_(made, LowRankConfig(scale, init=init, depth=depth))
    input = torch.randn(3, 2, 5, 5, dtype=dtype)
    expected = made(input)
    assert [factor.requires_grad for factor in made[0].factors()] == [not frozen] * depth
    torch.testing.assert_close(copy.deepcopy(made)(input), expected, rtol=0, atol=0)
    loaded = model(dtype, frozen)
    load_factorized_(loaded, made.state_dict())
    torch.testing.assert_close(loaded(input), expected, rtol=0, atol=0)

    decay = FrobeniusDecay(made, 0.1)
    groups = param_groups(made, weight_decay=0.1, decay=decay)
    assert sum(len(group["params"]) for group in groups) == len(list(made.parameters()))
    made(input).sum().backward()
    decay.step()
    torch.optim.SGD(groups, lr=0.01).step()
    assert all(parameter.isfinite().all() for parameter in made.parameters())

    outputs = made(input)
    densify_(made)
    assert made[0].weight.requires_grad is not frozen
    torch.testing.assert_close(made(input), outputs, rtol=1e-4, atol=1e-4)


def test_modules_that_are_used_twice_stay_shared():
    layer = nn.Linear(4, 4)
    twice = nn.Sequential(layer, nn.ReLU(), layer)
    factorize_(twice, LowRankConfig(0.5))
    assert twice[0] is twice[2]


@fuzzed
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.sampled_from([(1, 1), (3, 3), (1, 3), (2, 3)]), DTYPES,
       st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.sampled_from(["thin", "composed"]),
       st.booleans())  # fmt: skip
def test_convolutions_of_any_groups(groups, inputs, outputs, kernel, dtype, rank, stride, padding, contraction, flat):
    torch.manual_seed(0)
    options = {"groups": groups, "contraction": contraction, "dtype": dtype}
    channels = groups * inputs, groups * outputs
    if flat:
        layer = FactorizedConv1d(*channels, kernel[1], rank, stride, padding, **options)
        assert_like_dense(layer, torch.randn(2, channels[0], 9, dtype=dtype), dtype)
    else:
        layer = FactorizedConv2d(*channels, kernel, rank, stride, padding, **options)
        input = torch.randn(2, channels[0], 7, 6, dtype=dtype)
        assert_like_dense(layer, input, dtype)
        assert_like_dense(layer, input.to(memory_format=torch.channels_last), dtype)


def test_checkpoints_of_another_version(tmp_path):
    checkpoints.save_file(tmp_path / "later.pt", {"format": 99, "model": {}})
    with pytest.raises(ValueError, match="has format 99, but this version reads up to 1:"):
        checkpoints.load(tmp_path / "later.pt")
