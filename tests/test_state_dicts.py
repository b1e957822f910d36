"""State dicts of other programs and of old versions of torch, in everything that reads one."""

import json

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from common import LowRankConfig, factorize_, load_factorized_
from common.experiments import checkpoints
from common.state_dicts import unwrap
from resnet_cifar.models import build, is_factorized
from resnet_cifar.train import main


def network(*, factorized=False):
    torch.manual_seed(0)
    model = build("resnet20", 10)
    if factorized:
        factorize_(model, LowRankConfig(0.2), filter_fn=is_factorized)
    return model


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


WRAPPINGS = {
    "as it is": lambda state: state,
    "DataParallel": lambda state: prefixed(state, "module."),
    "torch.compile": lambda state: prefixed(state, "_orig_mod."),
    "DataParallel of a compiled model": lambda state: prefixed(state, "module._orig_mod."),
    "Lightning": lambda state: {"state_dict": prefixed(state, "model."), "epoch": 3, "hyper_parameters": {}},
    "net": lambda state: {"net": state, "acc": 91.2, "epoch": 7},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer_state_dict": {}, "loss": 0.1},
    "AveragedModel": lambda state: {**prefixed(state, "module."), "n_averaged": torch.tensor(5)},
    "a model's model": lambda state: {"model": {"state_dict": prefixed(state, "module.")}},
    "before torch 0.4.1": lambda state: prefixed(
        {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}, "module."
    ),
}


@pytest.mark.parametrize("factorized", [False, True])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappings_are_undone(wrapping, factorized, tmp_path):
    state = network(factorized=factorized).state_dict()
    torch.save(WRAPPINGS[wrapping](state), tmp_path / "weights.pt")
    loaded = checkpoints.load(tmp_path / "weights.pt")
    for found in (loaded, checkpoints.model_state(loaded, tmp_path / "weights.pt")):
        model = build("resnet20", 10)
        report = load_factorized_(model, found)
        assert bool(report.layers) == factorized
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name


def test_an_old_checkpoint_evaluates_and_is_factorized_by_the_program(tmp_path, capsys):
    """The form of a well-known published ResNet20: under "state_dict", of DataParallel, without counts of batches."""
    old = {"state_dict": WRAPPINGS["before torch 0.4.1"](network().state_dict()), "best_prec1": 91.7}
    torch.save(old, tmp_path / "resnet20.th")
    flags = ["--data", "digits", "--device", "cpu", "--arch", "resnet20"]
    main([*flags, "--evaluate", "--resume", str(tmp_path / "resnet20.th")])
    assert json.loads(capsys.readouterr().out).keys() == {"accuracy", "loss"}
    more = ["--pretrained", str(tmp_path / "resnet20.th"), "--rank-scale", "0.2", "--spectral", "--max-steps", "1"]
    main([*flags, *more, "--save-dir", str(tmp_path / "run")])
    assert (tmp_path / "run" / "result.json").exists()


class Turned(nn.Linear):
    """A layer that once stored its weight transposed."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, metadata, *args):
        if (metadata.get("version") or 1) < 2:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].mT
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model.state_dict(),
        lambda model: {"model": nn.DataParallel(model).state_dict()},
        lambda model: AveragedModel(model).state_dict(),
        lambda model: nn.DataParallel(torch.compile(model)).state_dict(),
        lambda model: {"state_dict": nn.ModuleDict({"model": model}).state_dict()},
    ],
)
@pytest.mark.parametrize("factorized", [False, True])
def test_versions_of_modules_are_kept(wrap, factorized, tmp_path):
    def make():
        return nn.Sequential(nn.Linear(3, 3), nn.Sequential(Turned(3, 3)))

    model = make()
    if factorized:
        factorize_(model, LowRankConfig(0.4), filter_fn=lambda module, name: name == "0")
    torch.save(wrap(model), tmp_path / "weights.pt")
    loaded = make()
    load_factorized_(loaded, torch.load(tmp_path / "weights.pt"))
    assert all(map(torch.equal, model.state_dict().values(), loaded.state_dict().values()))
    load_factorized_(loaded, dict(model.state_dict()))  # without versions
    assert torch.equal(loaded[1][0].weight, model[1][0].weight.mT)


def test_a_prefix_of_the_models_own_is_kept():
    model = nn.ModuleDict({"model": nn.Linear(2, 2)})
    report = load_factorized_(model, prefixed(model.state_dict(), "module."))
    assert not report.layers
    assert unwrap(model.state_dict(), model.state_dict()).keys() == {"model.weight", "model.bias"}


def test_some_missing_counts_are_an_error():
    state = network().state_dict()
    del state["bn1.num_batches_tracked"]
    with pytest.raises(ValueError, match=r"the checkpoint lacks 'bn1.num_batches_tracked'"):
        load_factorized_(network(), state)


@pytest.mark.parametrize(
    ("state", "named"),
    [({}, "nothing"), ({"epoch": 3, "weights": torch.ones(2)}, "'epoch'"), ({"net": {"conv": {"weight": 1}}}, "'conv'")],
)
def test_what_holds_no_state_dict_is_refused_by_its_keys(state, named, tmp_path):
    with pytest.raises(ValueError, match=f"not a model's state dict.*{named}"):
        load_factorized_(network(), state)
    with pytest.raises(ValueError, match=r"weights\.pt is not a checkpoint of a model"):
        checkpoints.model_state(state, tmp_path / "weights.pt")
