"""The recorded training step: the same training as without, nothing that a CUDA graph cannot hold, and its ways out.

What CUDA itself does is in tests/test_gpu.py. Here, "recording" a step gives the step itself, so that a replay runs it.
"""

import copy
import functools
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common import FactorizedLinear, FrobeniusDecay, Lamb, LowRankConfig, factorize_, param_groups
from common.experiments import checkpoints
from common.experiments.distributed import Processes
from common.experiments.graph import NotRecorded, StepGraph
from common.experiments.runs import Run
from common.norms import NormRecorder
from common.vision.config import ImageRunConfig
from common.vision.data import Data
from common.vision.training import Trainer
from compression_baselines.masks.base import Masks, Settings
from compression_baselines.masks.rigl import Rigl
from resnet_cifar import models
from tensor_wrn.layers import FORMS

CPU = torch.device("cpu")


def images(count=50, size=8):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return pixels, torch.randint(0, 10, (count,), generator=generator)


def low_rank(depth=2, contraction="composed"):
    torch.manual_seed(0)
    model = models.build("resnet20", 10)
    factorize_(model, LowRankConfig(0.111, depth=depth, contraction=contraction), filter_fn=models.is_factorized)
    return model


def tensors(form):
    torch.manual_seed(0)
    layers = nn.Sequential(*(FORMS[form](8, 8, 3, 0.5, padding=1) for _ in range(2)), FORMS[form](8, 16, 3, 0.5))
    for layer in layers:
        layer.pointwise.initialize_("regular")
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )


def make_trainer(model, *, record=None, data=None, device=CPU, lr_tensor=None, hook=None, optimizer=None, run="never", **flags):
    decay = FrobeniusDecay(model, 0.01) if any(hasattr(module, "chain") for module in model.modules()) else None
    groups = param_groups(model, weight_decay=1e-3, decay=decay)
    if optimizer is None:
        lr = lr_tensor if lr_tensor is not None else 0.05
        fused = lr_tensor is not None
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        for group in optimizer.param_groups:
            group |= {"lr": lr, "fused": fused}
    return Trainer(
        model,
        data or Data(images(), images(20), 10),
        Run(Path(run), {"program": "none"}, 0),
        config=ImageRunConfig(batch_size=20, **{"epochs": 8} | flags),
        processes=Processes(device),
        architecture={},
        optimizer=optimizer,
        schedule=lambda epoch: 0.05 if epoch < 3 else 0.01,
        decay=decay,
        hook=hook,
        record=record,
        loss=cross_entropy,
    )


def cross_entropy(network, batch):
    """In the precision of the network, where the programs' own is in float32."""
    logits = network(batch.images)
    return F.cross_entropy(logits, batch.labels), logits


def recorded(model, **options):
    lr = torch.tensor(0.05, dtype=next(model.parameters()).dtype)
    return make_trainer(model, record=options.pop("record", lambda step, stream: step), lr_tensor=lr, **options)


def train(trainer, steps):
    trainer.prepare()
    for _ in range(steps):
        if trainer.step % trainer.steps_per_epoch == 0:
            trainer.begin_epoch()
        trainer.next_step()


def assert_same_training(one, other, rtol):
    for (name, a), b in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        error = torch.linalg.vector_norm((a - b).double())
        assert error <= rtol * torch.linalg.vector_norm(b.double()), f"{name}: {error}"
    torch.testing.assert_close(one.totals, other.totals, rtol=rtol, atol=0)
    assert one.step == other.step


@pytest.fixture
def double(monkeypatch):
    """All of training in float64: weights, images and sums."""
    monkeypatch.setattr(Data, "_normalize", lambda self, pixels: (pixels * self._scale + self._shift).permute(0, 3, 1, 2))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


NETWORKS = {"depth 2": lambda: low_rank(2), "depth 3": lambda: low_rank(3)}
NETWORKS |= {form: lambda form=form: tensors(form) for form in FORMS} | {"dense": lambda: models.build("resnet20", 10)}


@pytest.mark.parametrize("network", NETWORKS)
def test_twenty_steps_are_those_of_the_ordinary_step(network, double):
    """In float64 over seven epochs, with a change of the learning rate, and a smaller batch at the end of each."""
    model = NETWORKS[network]()
    plain, graph = make_trainer(copy.deepcopy(model)), recorded(model)
    train(plain, 20)
    train(graph, 20)
    assert graph._graph.recordings == 1
    assert graph.optimizer.param_groups[0]["lr"].item() == pytest.approx(0.01)
    assert_same_training(graph, plain, rtol=1e-10)


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_a_resumed_recording_is_the_uninterrupted_one(stop, tmp_path):
    whole, first = recorded(low_rank()), recorded(low_rank())
    train(whole, 9)
    train(first, stop)
    checkpoints.save_file(tmp_path / "checkpoint.pt", first.state_dict())
    assert checkpoints.load(tmp_path / "checkpoint.pt")["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.05)
    second = recorded(low_rank())
    second.load_state_dict(checkpoints.load(tmp_path / "checkpoint.pt"))
    second.prepare()
    with pytest.raises(RuntimeError, match="before prepare"):
        second.load_state_dict(checkpoints.load(tmp_path / "checkpoint.pt"))
    second.begin_epoch()
    train(second, 9 - stop)
    for (name, a), b in zip(second.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(second.totals, whole.totals)


def test_a_run_with_evaluations_checkpoints_a_stop_and_hooks_moves_no_tensor(tmp_path):
    """All of fit(): what a replay would read stays where it is, so that one recording serves."""
    model = low_rank()
    hook = NormRecorder({"conv": model.layer1[0].conv1})
    recordings = []
    record = lambda step, stream: recordings.append(1) or step  # noqa: E731
    trainer = recorded(model, hook=hook, run=tmp_path / "run", epochs=4, record=record)
    trainer.run.begin()
    result = trainer.fit()
    assert len(recordings) == 1
    assert trainer._graph is None  # with the memory of the recording
    assert len(hook._norms) == trainer.step == 12
    plain = make_trainer(low_rank(), run=tmp_path / "plain", epochs=4)
    plain.run.begin()
    assert plain.fit()["final_loss"] == pytest.approx(result["final_loss"], rel=1e-2)


def test_a_stop_saves_and_ends_a_recorded_run(tmp_path):
    trainer = recorded(low_rank(), run=tmp_path / "run")
    trainer.run.begin()
    trainer.prepare()
    step = trainer.next_step

    def stopping():
        step()
        if trainer.step == 5:
            signal.raise_signal(signal.SIGTERM)

    trainer.next_step = stopping
    with pytest.raises(SystemExit) as stopped:
        trainer.fit()
    assert stopped.value.code == 75
    assert checkpoints.load(tmp_path / "run" / "checkpoint.pt")["step"] == 5


@pytest.mark.parametrize(
    "change", ["parameter", "storage", "momentum", "frozen", "buffer", "module", "weight decay", "coefficient"]
)
def test_what_moves_after_recording_is_recorded_anew(change, double):
    """A replay would go on with the old tensor. With a new recording, training is that of the ordinary step."""

    def replace(trainer):
        model = trainer.model
        with torch.no_grad():
            if change == "parameter":
                model.bn1.weight = nn.Parameter(model.bn1.weight.clone())
            elif change == "storage":
                model.linear.weight.data = model.linear.weight.clone()
            elif change == "momentum":
                trainer.optimizer.state.clear()
            elif change == "frozen":
                model.bn1.weight.requires_grad_(False)
            elif change == "module":
                model.bn1 = copy.deepcopy(model.bn1)
            elif change == "weight decay":
                trainer.optimizer.param_groups[0]["weight_decay"] = 0.1
            elif change == "coefficient":
                trainer.decay.coef = 0.1
            else:
                model.bn1.running_mean = model.bn1.running_mean.clone()

    plain, graph = make_trainer(low_rank()), recorded(low_rank())
    for trainer in (plain, graph):
        train(trainer, 7)
        replace(trainer)
        train(trainer, 8)
    assert graph._graph.recordings == 2
    assert_same_training(graph, plain, rtol=1e-10)


def test_a_step_that_cannot_be_recorded_falls_back_with_one_line(capsys, double):
    def refuse(step, stream):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    plain, graph = make_trainer(low_rank()), recorded(low_rank(), record=refuse)
    train(plain, 9)
    train(graph, 9)
    assert_same_training(graph, plain, rtol=1e-10)
    assert graph._graph is None
    assert capsys.readouterr().err.splitlines() == [
        "steps are not recorded as a CUDA graph and run kernel by kernel: "
        "RuntimeError: operation not permitted when stream is capturing"
    ]


def test_a_learning_rate_that_is_a_number_is_not_recorded(capsys):
    trainer = make_trainer(low_rank(), record=lambda step, stream: pytest.fail("recorded"))
    train(trainer, 6)
    assert capsys.readouterr().err.count("learning rate is a number") == 1


def test_a_hook_within_the_step_is_not_recorded(capsys):
    model = models.build("resnet20", 10)
    masks = Masks(model)
    hook = Rigl(masks, Settings(nonzero=9000, steps=20, steps_per_epoch=3, epochs=7, drop_fraction=0.3))
    hook.start(model, [])
    trainer = recorded(model, hook=hook, record=lambda step, stream: pytest.fail("recorded"))
    masks.optimizer = trainer.optimizer
    train(trainer, 6)
    assert "Rigl acts between backward and the optimizer's step" in capsys.readouterr().err


def test_an_optimizer_that_waits_under_fp16_is_not_recorded(capsys):
    for make, recorded in ((Lamb, False), (functools.partial(torch.optim.SGD, fused=True), True)):
        model = low_rank()
        optimizer = make(model.parameters(), torch.tensor(0.05))
        trainer = make_trainer(model, optimizer=optimizer, record=lambda step, stream: step, amp="fp16")
        trainer.prepare()
        assert (trainer._graph is not None) == recorded
    assert capsys.readouterr().err.count("under fp16 Lamb waits to know whether gradients have overflowed") == 1


class Strict(TorchDispatchMode):
    """Refuses what would wait for a GPU, or whose shape depends on data, and operands that are on the host."""

    WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self, device):
        super().__init__()
        self.device, self.count = device, 0

    def __enter__(self):
        self.made = {name: getattr(torch, name) for name in ("tensor", "as_tensor")}
        for name in self.made:  # no operator of theirs shows that they copy
            setattr(torch, name, self.refuse_numbers)
        return super().__enter__()

    def __exit__(self, *error):
        for name, function in self.made.items():
            setattr(torch, name, function)
        return super().__exit__(*error)

    @staticmethod
    def refuse_numbers(*args, **kwargs):
        raise RuntimeError("torch.tensor copies numbers from the host")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name.split(".")[0] in self.WAITS:
            raise RuntimeError(f"{name} waits for the device")
        masks = [t for t in pytree.tree_leaves(args[1:2]) if isinstance(t, torch.Tensor) and t.dtype == torch.bool]
        if name.startswith("index") and masks:
            raise RuntimeError(f"{name} by a mask has a shape that depends on data")
        self.count += 1
        if name.startswith("_fused_sgd_"):  # has no implementation for tensors without data; works in place
            return None
        result = func(*args, **kwargs)
        for tensor in pytree.tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and tensor.device != self.device:
                raise RuntimeError(f"{name} takes or makes a tensor on the host: a copy")
        return result


@pytest.fixture
def without_data(monkeypatch):
    """A trainer whose every tensor is on the meta device, which stands for a GPU: it has shapes and no data."""
    meta = torch.device("meta")
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())

    def make(model, **options):
        model.to(meta)
        lr = torch.empty((), device=meta)
        data = Data(images(), images(20), 10, device=meta, cutout=4)
        trainer = make_trainer(model, record=lambda step, stream: step, data=data, device=meta, lr_tensor=lr, **options)
        trainer.optimizer._need_device_dtype_check_for_fused = False
        trainer.prepare()
        trainer.begin_epoch()
        return trainer

    return make


@pytest.mark.parametrize("network", [*NETWORKS, "thin"])
def test_nothing_in_a_step_waits_for_the_device_or_copies_from_the_host(network, without_data):
    trainer = without_data(low_rank(contraction="thin") if network == "thin" else NETWORKS[network]())
    with Strict(torch.device("meta")) as strict:
        trainer.next_step()
        trainer.next_step()
    assert strict.count > 300


def test_a_step_of_lamb_with_decay_neither_waits_nor_copies(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    meta = torch.device("meta")
    model = nn.Sequential(*(FactorizedLinear(8, 8, 2) for _ in range(2)), nn.LayerNorm(8)).to(meta)
    decay = FrobeniusDecay(model, 0.1)
    groups = param_groups(model, weight_decay=0.01, decay=decay) + [{"params": [nn.Parameter(torch.ones(3, device=meta))]}]
    optimizer = Lamb([*groups[:2], {**groups[2], "adapt": False}], torch.empty((), device=meta), decay=decay)
    for parameter in (p for group in groups for p in group["params"]):
        parameter.grad = torch.empty_like(parameter)
    with Strict(meta) as strict:
        optimizer.step()
        optimizer.step()
    assert strict.count > 50


def waits(trainer):
    return trainer.totals.sum().item()


def depends_on_data(trainer):
    return trainer._feed.order.nonzero()


def chooses_by_mask(trainer):
    return trainer._feed.order[trainer._feed.order > 3]


def copies(trainer):
    return trainer.totals + torch.ones(3, device="cpu").to(trainer.totals.device)


def makes_on_the_host(trainer):
    return torch.zeros(3)


def makes_of_numbers(trainer):
    return trainer.totals * torch.tensor([1.0, 2.0, 3.0], device=trainer.totals.device)


OFFENCES = {
    waits: "waits for the device",
    depends_on_data: "waits for the device",
    chooses_by_mask: "a shape that depends on data",
    copies: "a tensor on the host",
    makes_on_the_host: "a tensor on the host",
    makes_of_numbers: "copies numbers from the host",
}


@pytest.mark.parametrize("offence", OFFENCES)
def test_each_offence_is_caught(offence, without_data):
    trainer = without_data(low_rank())
    inner = trainer.loss

    def loss(network, batch):
        offence(trainer)
        return inner(network, batch)

    trainer.loss = loss
    with Strict(torch.device("meta")), pytest.raises(RuntimeError, match=OFFENCES[offence]):
        trainer.next_step()


def test_steps_before_recording_are_steps():
    made = []
    graph = StepGraph(lambda: made.append("step"), list, record=lambda step, stream: lambda: made.append("replay"))
    for _ in range(5):
        graph()
    assert made == ["step"] * 3 + ["replay"] * 2


def test_a_skipped_first_step_leaves_no_momentum():
    """torch's fused SGD would keep whatever was in the memory it takes."""
    trainer = recorded(low_rank())
    trainer.prepare()
    trainer.begin_epoch()
    momenta = [values["momentum_buffer"] for values in trainer.optimizer.state.values()]
    assert len(momenta) == len(list(trainer.model.parameters()))
    assert not any(momentum.any() for momentum in momenta)
    plain = make_trainer(low_rank())
    plain.begin_epoch()
    assert not plain.optimizer.state


@pytest.mark.parametrize("network", ["depth 2", "depth 3", "TensorTrain"])
def test_a_compiled_network_is_compiled_once(network, monkeypatch, double):
    """Weights that are composed anew for every step, and the smaller batch at an epoch's end, make no second compilation."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    trainer = recorded(NETWORKS[network](), compile=True)
    train(trainer, 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(trainer, 8)
    plain = recorded(NETWORKS[network]())
    train(plain, 9)
    assert_same_training(trainer, plain, rtol=1e-8)


@pytest.mark.parametrize("where", ["before unscaling", "after unscaling"])
def test_a_step_that_breaks_off_leaves_nothing_behind(where, capsys, monkeypatch):
    """Scaler and composition have begun a step that recording did not finish; the next one is an ordinary one."""
    trainer = recorded(low_rank(), record=lambda step, stream: step() or step)
    monkeypatch.setattr(trainer, "scaler", torch.amp.GradScaler("cpu", init_scale=4.0))
    name = "zero_grad" if where == "before unscaling" else "step"
    inner, broken = getattr(trainer.optimizer, name), []

    def breaks(*args, **kwargs):
        if trainer.step == 4 and not broken:
            broken.append(1)
            raise AssertionError
        return inner(*args, **kwargs)

    monkeypatch.setattr(trainer.optimizer, name, breaks)
    train(trainer, 9)
    assert broken
    assert capsys.readouterr().err.strip().endswith("kernel by kernel: AssertionError")
    assert trainer.step == 9
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_what_is_said_of_a_failed_recording_is_the_steps_own_error():
    def step():
        try:
            {}["x"]
        except KeyError:
            raise ValueError("the reason") from None

    def record(step, stream):
        try:
            step()
        finally:
            raise RuntimeError("ending the recording failed")

    graph = StepGraph(lambda: None, list, record=record)
    for _ in range(3):
        graph()
    graph._step = step
    with pytest.raises(NotRecorded, match=r"^ValueError: the reason$"):
        graph()


def test_masks_tie_no_parameter_to_a_stream():
    """A weight that was computed before the first step would keep its Parameter's node, and the stream of that."""
    model = models.build("resnet20", 10)
    Masks(model)
    assert all(not layer.weight.requires_grad for layer in model.modules() if isinstance(layer, nn.Conv2d))


def test_contractions_of_a_gpu_are_not_claimed_elsewhere():
    trainer = make_trainer(low_rank(contraction="auto"))
    trainer.contractions = {"layer1.0.conv1": "composed"}
    trainer.prepare()
    assert trainer.contractions is None
