"""The masked language model: attention, positions, the head, initializations, decay and checkpoints, in float64."""

import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bert_pretraining.config import POSITIONS
from bert_pretraining.model import (
    EncoderConfig,
    EncoderLayer,
    MaskedLanguageModel,
    alibi,
    count_full,
    directed_alibi,
    frobenius_decay,
    from_checkpoint,
    products,
)
from common import FactorizedEmbedding, FactorizedLinear, MultiheadAttention, attention_pairs
from common.budget import count_parameters
from common.linalg import compose, spectral_init

SMALL = {"words": 23, "embed_dim": 16, "ffn_dim": 24, "layers": 2, "heads": 4, "max_positions": 12}
EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def config(**options):
    return EncoderConfig(**(SMALL | options))


def make(seed=0, **options):
    torch.manual_seed(seed)
    return MaskedLanguageModel(config(**options))


def sequences(batch=3, length=9):
    return torch.randint(5, 23, (batch, length))


def head_products(model, kind):
    """W_Q,h^T W_K,h or W_O,h W_V,h of every head of every layer, computed directly: (layers * heads, embed_dim, embed_dim)."""
    found = []
    for layer in model.layers:
        attention = layer.self_attention
        size = attention.head_dim
        for head in range(attention.num_heads):
            rows = slice(head * size, (head + 1) * size)
            query, key, value = (getattr(attention, name).weight[rows] for name in ("query", "key", "value"))
            found.append(query.T @ key if kind == "quekey" else attention.output.weight[:, rows] @ value)
    return torch.stack(found).detach()


def test_a_layer_is_torchs():
    torch.manual_seed(0)
    ours = EncoderLayer(config())
    torchs = nn.TransformerEncoderLayer(16, 4, 24, 0.0, "gelu", batch_first=True, norm_first=True, bias=False)
    attention, forward = ours.self_attention, ours.feed_forward
    pairs = {
        torchs.self_attn.in_proj_weight: torch.cat([attention.query.weight, attention.key.weight, attention.value.weight]),
        torchs.self_attn.out_proj.weight: attention.output.weight,
        torchs.linear1.weight: forward.fc1.weight,
        torchs.linear2.weight: forward.fc2.weight,
    }
    with torch.no_grad():
        for theirs, own in pairs.items():
            theirs.copy_(own)
        for theirs, own in ((torchs.norm1, ours.norm1), (torchs.norm2, ours.norm2)):
            theirs.weight.copy_(own.weight.uniform_(0.5, 1.5))
    x = torch.randn(2, 7, 16, requires_grad=True)
    padded = torch.zeros(2, 7, dtype=torch.bool)
    padded[1, 5:] = True
    for theirs, mask in ((None, None), (padded, ~padded[:, None, None, :])):
        found, expected = ours(x, mask), torchs(x, src_key_padding_mask=theirs)
        torch.testing.assert_close(found, expected, **EXACT)
        probe = torch.randn_like(x)
        gradients = [torch.autograd.grad((y * probe).sum(), x)[0] for y in (found, expected)]
        torch.testing.assert_close(*gradients, **EXACT)


OPTIONS = {
    "dense": {},
    "narrow": {"rank_scale": 0.5, "positions": "alibi"},
    "directed": {"rank_scale": 0.5, "positions": "directed-alibi"},
    "factorized": {"rank_scale_layers": 0.5, "rank_scale_embeddings": 0.25},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_scores_at_positions_are_those_of_all_positions(options):
    model, tokens = make(**options), sequences()
    positions = torch.tensor([[0, 3], [8, 8], [5, 1]])
    everywhere = model.score(model.encode(tokens))
    assert everywhere.shape == (3, 9, 23)
    found = model(tokens, positions)
    expected = torch.cat([scores[chosen] for scores, chosen in zip(everywhere, positions, strict=True)])
    torch.testing.assert_close(found, expected, **EXACT)
    probe = torch.randn_like(found)
    gradients = [torch.autograd.grad((y * probe).sum(), list(model.parameters())) for y in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_a_position_past_the_end_is_an_error():
    with pytest.raises(IndexError):
        make()(sequences(), torch.tensor([[0], [9], [1]]))


def test_words_are_scored_by_the_table_they_are_read_from():
    model, tokens = make(layers=1), sequences()
    assert {name.split(".")[0] for name in model.state_dict()} == {"embed_tokens", "embed_positions", "layers", "norm"}
    hidden = model.encode(tokens)
    torch.testing.assert_close(model.score(hidden), hidden @ model.embed_tokens.weight.T, **EXACT)
    torch.testing.assert_close(hidden.mean(-1), torch.zeros(3, 9), **EXACT)
    torch.testing.assert_close(hidden.var(-1, correction=0), torch.ones(3, 9), rtol=1e-2, atol=0)


@pytest.mark.parametrize("positions", POSITIONS)
def test_padding_changes_nothing_at_words(positions):
    model, tokens = make(positions=positions, rank_scale=0.5), sequences(2, 6)
    padded, words = F.pad(tokens, (0, 3)), F.pad(torch.ones_like(tokens, dtype=torch.bool), (0, 3))
    words[1, 4:] = False
    found = model.encode(padded, words)
    torch.testing.assert_close(found[0, :6], model.encode(tokens)[0], **EXACT)
    torch.testing.assert_close(found[1, :4], model.encode(tokens[:, :4])[1], **EXACT)
    assert not torch.allclose(model.encode(padded)[:, :4], found[:, :4])
    assert found.isfinite().all()


def test_learned_positions_are_added_to_words_and_tell_places_apart():
    model, tokens = make(layers=1), torch.full((1, 5), 7)
    different = model.encode(tokens)[0]
    assert not torch.allclose(different[0], different[1])
    with torch.no_grad():
        model.embed_positions.weight.zero_()
    same = model.encode(tokens)[0]
    torch.testing.assert_close(same, same[:1].expand(5, -1), **EXACT)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12])
def test_alibi_is_minus_slope_times_distance(heads):
    """Slopes for numbers of heads that are not powers of two, as the paper's code gives them."""
    slopes = {
        3: [2**-4, 2**-8, 2**-2],
        6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3],
        12: [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5],
    }.get(heads) or [2 ** (-8 * (h + 1) / heads) for h in range(heads)]
    bias = alibi(heads, 5)
    for h in range(heads):
        for i in range(5):
            for j in range(5):
                assert bias[h, i, j].item() == pytest.approx(-slopes[h] * abs(i - j), rel=1e-15)


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_directed_alibi_looks_back_in_even_heads_and_ahead_in_odd_ones(heads):
    bias = directed_alibi(heads, 5)
    slopes = {1: [2**-8], 3: [2**-4, 2**-4, 2**-8], 4: [2**-4, 2**-4, 2**-8, 2**-8]}[heads]
    for h in range(heads):
        for i in range(5):
            for j in range(5):
                seen = j <= i if h % 2 == 0 else j >= i
                assert bias[h, i, j].item() == (-slopes[h] * abs(i - j) if seen else -math.inf)


def test_only_with_directed_alibi_an_encoder_tells_a_sequence_from_its_reverse():
    for positions in ("alibi", "directed-alibi"):
        model, tokens = make(positions=positions), sequences()
        same = torch.allclose(model.encode(tokens.flip(1)), model.encode(tokens).flip(1), **EXACT)
        assert same == (positions == "alibi")


def test_an_alibi_encoder_is_what_a_loop_over_pairs_of_positions_gives():
    model, tokens = make(positions="alibi", heads=2, layers=1, rank_scale=0.5), sequences(1, 5)
    layer = model.layers[0]
    attention, x = layer.self_attention, model.embed_tokens.weight[tokens[0]]
    normed = layer.norm1(x)
    added = torch.zeros(5, 16)
    for h, slope in enumerate([2**-4, 2**-8]):
        rows = slice(4 * h, 4 * h + 4)
        query, key, value = ((normed @ getattr(attention, n).weight[rows].T) for n in ("query", "key", "value"))
        for i in range(5):
            scores = torch.stack([query[i] @ key[j] / 4**0.5 - slope * abs(i - j) for j in range(5)])
            added[i] += attention.output.weight[:, rows] @ (scores.softmax(0) @ value)
    x = x + added
    x = model.norm(x + layer.feed_forward(layer.norm2(x)))
    torch.testing.assert_close(model.encode(tokens)[0], x, **EXACT)


def test_weights_are_drawn_with_one_standard_deviation():
    model = make(words=400, embed_dim=64, ffn_dim=256, max_positions=64)
    std = 0.02 * (768 / 64) ** 0.5
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        else:
            assert parameter.std().item() == pytest.approx(std, rel=5 / parameter.numel() ** 0.5), name
            assert abs(parameter.mean().item()) < 5 * std / parameter.numel() ** 0.5, name
    assert make(words=400, init_std=0.5).embed_tokens.weight.std().item() == pytest.approx(0.5, rel=0.05)


HALF = {"rank_scale": 0.5}


def test_spectral_initialization_is_the_truncated_svd_of_full_heads():
    """The factors are also balanced: those of each product's truncated SVD, up to the signs of singular vectors."""
    full = make()
    for kind in ("quekey", "outval"):
        narrow = make(**HALF, **{f"{kind}_init": "spectral"})
        found = head_products(narrow, kind)
        factors = [each for pair in products(narrow)[kind] for each in zip(*pair.factors(), strict=True)]
        for product, (u, vt), wide in zip(found, factors, head_products(full, kind), strict=True):
            expected_u, expected_vt = spectral_init(wide, 2)
            torch.testing.assert_close(product, expected_u @ expected_vt, **EXACT)
            signs = (expected_u * u).sum(0).sign()
            torch.testing.assert_close(u, expected_u * signs, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(vt, expected_vt * signs[:, None], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"rank_scale": 1.0}, HALF | {"spectral_from": "narrow"}])
def test_balancing_keeps_products_and_scores(options):
    regular = make(**options)
    balanced = make(**options, quekey_init="spectral", outval_init="spectral")
    tokens, positions = sequences(), torch.tensor([[0, 3], [8, 8], [5, 1]])
    torch.testing.assert_close(balanced(tokens, positions), regular(tokens, positions), rtol=1e-9, atol=1e-10)
    for kind in ("quekey", "outval"):
        torch.testing.assert_close(head_products(balanced, kind), head_products(regular, kind), **EXACT)
        for pair in products(balanced)[kind]:
            u, vt = pair.factors()
            torch.testing.assert_close(u.mT @ u, vt @ vt.mT, **EXACT)
        assert not torch.allclose(*(products(model)[kind][0].u for model in (regular, balanced)))


@pytest.mark.parametrize("kind", ["quekey", "outval"])
def test_norm_matched_heads_are_regular_ones_with_the_norms_of_spectral_ones(kind):
    regular, spectral, matched = (make(**HALF, **{f"{kind}_init": i}) for i in ("regular", "spectral", "norm-matched"))
    regular, spectral, matched = (head_products(model, kind) for model in (regular, spectral, matched))
    norms = torch.linalg.matrix_norm(spectral)
    torch.testing.assert_close(torch.linalg.matrix_norm(matched), norms, **EXACT)
    torch.testing.assert_close(matched, regular * (norms / torch.linalg.matrix_norm(regular))[:, None, None], **EXACT)
    assert norms.mean() > 1.05 * torch.linalg.matrix_norm(regular).mean()


QUEKEY = ("query", "key")


def test_all_else_is_drawn_alike_whatever_the_heads_are():
    """Layers, tables, and the products whose initialization is not changed."""
    factorized = {"rank_scale_layers": 0.5, "rank_scale_embeddings": 0.5}
    first = make(**HALF, **factorized)
    for other in (
        make(**HALF, **factorized),
        make(**HALF, **factorized, quekey_init="spectral"),
        make(**HALF, **factorized, quekey_init="norm-matched"),
        make(**HALF, **factorized, quekey_init="spectral", spectral_from="narrow"),
        make(**factorized),
        make(**factorized, rank_scale=0.25, quekey_init="spectral"),
    ):
        for name, parameter in other.named_parameters():
            head = name.split(".")[-2] if "self_attention" in name else None
            alike = head is None if other.config.head_dim != 2 else other.config.quekey_init == "regular" or head not in QUEKEY
            assert not alike or torch.equal(parameter, first.get_parameter(name)), name
    assert not torch.equal(make(seed=1).embed_tokens.weight, make().embed_tokens.weight)


@pytest.mark.parametrize("positions", [1, 400], ids=["few positions", "many positions"])
@pytest.mark.parametrize("scale", [0.25, 0.95])
def test_a_factorized_table_scores_as_the_dense_product(scale, positions):
    """By its two factors in turn if that is less work, otherwise by their product."""
    model, hidden = make(words=40, rank_scale_embeddings=scale), torch.randn(positions, 16, requires_grad=True)
    table = model.embed_tokens
    assert isinstance(table, FactorizedEmbedding)
    torch.testing.assert_close(model.score(hidden), hidden @ (table.u @ table.vt).T, **EXACT)
    with torch.profiler.profile(record_shapes=True) as profile:
        model.score(hidden)
    shapes = [event.input_shapes for event in profile.events() if event.name == "aten::mm"]
    composed = [[40, table.rank], [table.rank, 16]] in shapes
    assert composed == (scale == 0.95 and positions == 400)


def test_what_is_factorized_and_how_much_that_leaves():
    model = make(**HALF, rank_scale_layers=0.5, rank_scale_embeddings=0.25)
    factorized = {name for name, m in model.named_modules() if isinstance(m, FactorizedLinear | FactorizedEmbedding)}
    layers = {f"layers.{i}.feed_forward.fc{j}" for i in (0, 1) for j in (1, 2)}
    assert factorized == {"embed_tokens", "embed_positions"} | layers == {row.name for row in model.report.layers}
    expected = 4 * (23 + 16) + 3 * (12 + 16) + 2 * (4 * 8 * 16 + 2 * 8 * (16 + 24) + 2 * 16) + 16
    assert count_parameters(model) == model.report.compressed == expected
    assert model.report.original == count_full(model.config) == count_parameters(make()) == make().report.compressed
    assert count_full(config(positions="alibi")) == count_parameters(make(positions="alibi"))


def test_initializations_of_layers_and_tables():
    scales = {"rank_scale_layers": 0.5, "rank_scale_embeddings": 0.25}
    dense = make()
    spectral, matched, regular = (make(**scales, init=init) for init in ("spectral", "norm-matched", "regular"))
    for row in spectral.report.layers:
        weight = dense.get_submodule(row.name).weight
        expected = compose(spectral_init(weight, row.rank))
        torch.testing.assert_close(spectral.get_submodule(row.name).to_dense(), expected, **EXACT)
        norm = torch.linalg.matrix_norm(matched.get_submodule(row.name).to_dense())
        torch.testing.assert_close(norm, torch.linalg.matrix_norm(expected), **EXACT)
    factors = torch.cat(
        [factor.flatten() for row in regular.report.layers for factor in regular.get_submodule(row.name).factors()]
    )
    assert factors.std().item() == pytest.approx(regular.config.std, rel=0.1)


@pytest.mark.parametrize("asked", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("decoupled", [False, True])
def test_decay_covers_the_products_asked_for(asked, decoupled):
    layers, query_key, output_value = asked
    model = make(**HALF, rank_scale_layers=0.5, rank_scale_embeddings=0.25)
    dense = [m.to_dense() for m in model.modules() if isinstance(m, FactorizedLinear | FactorizedEmbedding)]
    expected = sum(weight.square().sum() for weight in dense) if layers else 0
    for kind, wanted in (("quekey", query_key), ("outval", output_value)):
        expected = expected + (head_products(model, kind).square().sum() if wanted else 0)
    decay = frobenius_decay(model, 0.3, layers, query_key, output_value, decoupled=decoupled)
    torch.testing.assert_close(decay.penalty(), torch.as_tensor(0.15 * expected), **EXACT)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kinds = {"u": layers, "vt": layers, "query": query_key, "key": query_key, "value": output_value, "output": output_value}
    chosen = {name for name in names.values() if any(kinds.get(part) for part in name.split("."))}
    assert {names[id(parameter)] for parameter in decay.parameters()} == chosen
    decay.step(*([0.1] if decoupled else []))
    model.layers[0].self_attention.key.weight = nn.Parameter(torch.ones(8, 16))
    if query_key:
        with pytest.raises(RuntimeError, match=r"key.weight was replaced"):
            decay.step(*([0.1] if decoupled else []))


def test_decay_of_nothing():
    assert frobenius_decay(make(), 0.1, False, False, False) is None
    with pytest.raises(ValueError, match="nothing to decay"):
        frobenius_decay(make(), 0.1, True, False, False)


def test_attention_pairs_finds_the_same_products():
    model = make(**HALF)
    found = {pair.name: pair for pair in attention_pairs(model)}
    own = {pair.name: pair for kind in products(model).values() for pair in kind}
    assert found.keys() == own.keys()
    for name, pair in found.items():
        for one, other in zip(pair.factors(), own[name].factors(), strict=True):
            assert torch.equal(one, other)
            assert one.data_ptr() == other.data_ptr()


def test_dropout_is_applied_in_training_only():
    model, tokens = make(dropout=0.5), sequences()
    assert not torch.equal(model.encode(tokens), model.encode(tokens))
    model.eval()
    assert torch.equal(model.encode(tokens), make().encode(tokens))


def test_attention_of_one_product_is_that_of_three():
    torch.manual_seed(0)
    attention, x = MultiheadAttention(12, 3, head_dim=2), torch.randn(2, 5, 12)
    mask = torch.randn(3, 5, 5)
    torch.testing.assert_close(attention(x, mask=mask), attention(x, attention.project(x), mask), **EXACT)


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_checkpoint_is_enough_and_is_checked(positions):
    heads = {"quekey_init": "spectral", "outval_init": "norm-matched"}
    options = {"positions": positions, **HALF, "rank_scale_layers": 0.5, "rank_scale_embeddings": 0.25, "init": "spectral"}
    model, tokens = make(**options, **heads), sequences()
    architecture, weights = asdict(model.config), model.state_dict()
    before = torch.get_rng_state()
    loaded = from_checkpoint(architecture, weights)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(loaded.encode(tokens), model.encode(tokens))
    assert loaded.config == model.config
    assert loaded.report == model.report
    with pytest.raises(ValueError, match="has 'depth', which is not known here"):
        from_checkpoint({**architecture, "depth": 3}, weights)
    with pytest.raises(ValueError, match="lacks 'words'"):
        from_checkpoint({name: value for name, value in architecture.items() if name != "words"}, weights)
    with pytest.raises(ValueError, match="weights do not fit"):
        from_checkpoint({**architecture, "layers": 3}, weights)
    with pytest.raises(ValueError, match="weights do not fit"):
        from_checkpoint(architecture, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": 0}, "words must be at least 1, got 0"),
        ({"heads": 5}, "embed_dim 16 is not divisible by 5 heads"),
        (
            {"positions": "rotary"},
            "rotation gives each distance its own query-key product, so there is no single one to initialize",
        ),
        ({"positions": "sinusoidal"}, "positions must be learned or alibi or directed-alibi, got 'sinusoidal'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"init_std": 0.0}, "init_std must be positive and finite, got 0.0"),
        ({"init_std": float("nan")}, "init_std must be positive and finite, got nan"),
        ({"rank_scale": 1.5}, r"rank_scale must be in \[0, 1\], where 0 and 1 are full width, got 1.5"),
        ({"rank_scale_embeddings": float("nan")}, "rank_scale_embeddings must be in .*, got nan"),
        ({"rank_scale": 0.2}, "rank_scale 0.2 leaves no dimension of the 4 of a head: it must be at least 0.25"),
        ({"init": "xavier"}, "init must be one of regular, spectral, norm-matched, got 'xavier'"),
        ({"outval_init": "kaiming"}, "outval_init must be one of .*, got 'kaiming'"),
        ({"init": "spectral"}, "init 'spectral' needs rank_scale_layers or rank_scale_embeddings between 0 and 1"),
        ({"quekey_init": "norm-matched"}, "quekey_init 'norm-matched' needs a rank_scale between 0 and 1, got 0.0"),
        ({"rank_scale": 1.0, "outval_init": "norm-matched"}, "outval_init 'norm-matched' needs .*, got 1.0"),
        ({"spectral_from": "half"}, "spectral_from must be full or narrow, got 'half'"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_a_sequence_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="a sequence of 13 tokens is longer than max_positions 12"):
        make(positions="alibi").encode(sequences(1, 13))
