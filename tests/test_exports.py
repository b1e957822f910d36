"""What torch does with a model works on factorized ones: export, ONNX, compiling, averaging, checkpointing, sharding."""

import copy
import io
import warnings

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from common import FrobeniusDecay, LowRankConfig, densify_, factorize_, param_groups


class Words(nn.Module):
    """Tied words around torch's attention."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(24, 16, padding_idx=0)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.output = nn.Linear(16, 24, bias=False)
        self.output.weight = self.words.weight

    def forward(self, index):
        hidden = self.words(index)
        return self.output(hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0])


def image_model():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 16, 3, groups=16, stride=2),
        nn.Flatten(2), nn.Conv1d(16, 8, 3), nn.Flatten(), nn.Linear(8 * 7, 12),
    )  # fmt: skip


MODELS = {"images": (image_model, lambda: torch.randn(2, 3, 9, 9)), "words": (Words, lambda: torch.randint(0, 24, (2, 6)))}


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def make(name, **options):
    torch.manual_seed(0)
    build, data = MODELS[name]
    model = build()
    factorize_(model, LowRankConfig(0.3, rank_of="min", **options), skip_growing=False)
    return model, data()


@pytest.mark.parametrize("depth", [2, 3])
def test_export(name, depth):
    model, x = make(name, depth=depth)
    model.eval()
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


def test_onnx(name):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, x = make(name)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    from onnx.reference import ReferenceEvaluator

    file = io.BytesIO()
    program.save(file)
    import onnx

    evaluator = ReferenceEvaluator(onnx.load_model_from_string(file.getvalue()))
    (found,) = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-3, atol=1e-5)


def train_step(model, forward, x):
    decay = FrobeniusDecay(model, 0.1)
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=0.1, decay=decay), lr=0.1)
    forward(x).square().mean().backward()
    decay.step()
    optimizer.step()


def assert_equal_weights(found, expected):
    for (name, one), two in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, two, msg=lambda text, name=name: f"{name}: {text}")


def test_compiled_steps_are_eager_ones(name):
    model, x = make(name)
    eager = copy.deepcopy(model)
    train_step(model, torch.compile(model, backend="aot_eager"), x)
    train_step(eager, eager, x)
    assert_equal_weights(model, eager)


def test_surgery_inside_a_compiled_model_is_seen_by_it(name):
    torch.manual_seed(0)
    build, data = MODELS[name]
    model, x = build().eval(), data()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    factorize_(compiled, LowRankConfig(0.3, rank_of="min"), skip_growing=False)
    torch.testing.assert_close(compiled(x), model(x))
    densify_(compiled)
    torch.testing.assert_close(compiled(x), model(x))


def test_checkpointed_gradients_are_the_same(name):
    model, x = make(name)
    plain = copy.deepcopy(model)
    train_step(model, lambda x: checkpoint(model, x, use_reentrant=False), x)
    train_step(plain, plain, x)
    assert_equal_weights(model, plain)


def test_averaged_factors(name):
    model, x = make(name)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    first = copy.deepcopy(model)
    train_step(model, model, x)
    averaged.update_parameters(model)
    for found, one, two in zip(averaged.module.parameters(), first.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, (one + two) / 2)
    expected = averaged(x)
    densify_(averaged)
    torch.testing.assert_close(averaged(x), expected, rtol=1e-4, atol=1e-5)


def sharded_step(rank, port, name, results):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        model, x = make(name)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        train_step(model, model, x)
        full = {key: p.full_tensor() if isinstance(p, DTensor) else p for key, p in model.named_parameters()}
        if rank == 0:
            torch.save({key: value.detach() for key, value in full.items()}, results)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_steps_of_two_processes_are_those_of_one(name, tmp_path):
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    results = tmp_path / "weights.pt"
    multiprocessing.spawn(sharded_step, (port, name, results), nprocs=2)
    model, x = make(name)
    train_step(model, model, x)
    for key, value in torch.load(results).items():
        torch.testing.assert_close(value, model.get_parameter(key).detach(), rtol=1e-4, atol=1e-6)
