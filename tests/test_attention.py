"""Factor pairs of attention heads, against the modules' own outputs and against dense products, head by head, in float64."""

import warnings

import pytest
import torch
from torch import nn

from common import FactorizedLinear, FrobeniusDecay, LowRankConfig, attention_pairs, factorize_, param_groups

COEF = 0.3
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def torch_attention(**options):
    return nn.Sequential(nn.MultiheadAttention(12, 3, batch_first=True, **options))


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=8,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.BertModel(config)


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_embd=12, n_layer=1, n_head=3, attn_implementation="eager")
    return transformers.GPT2Model(config)


def vit():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=8,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.ViTModel(config, add_pooling_layer=False)


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=12, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2, intermediate_size=8,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaModel(config)


def timm_attention(**options):
    timm = pytest.importorskip("timm")
    return nn.Sequential(timm.layers.Attention(12, 3, **options))


MODELS = {
    "torch": torch_attention,
    "torch, several sizes": lambda: torch_attention(kdim=10, vdim=8),
    "BERT": bert,
    "GPT-2": gpt2,
    "ViT": vit,
    "Llama": llama,
    "timm": lambda: timm_attention(qkv_bias=True),
}


def make(name):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    for each, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.normal_() if "bias" not in each else parameter.zero_()
    return model


def pairs_of(name, model):
    return attention_pairs(model, query_key=name != "Llama", ignore_biases=True)


def attend(name, model, x):
    """Output and probabilities (batch, heads, length, length) of the one attention of the model."""
    if name.startswith("torch"):
        key, value = (x[..., :size].clone() for size in (model[0].kdim, model[0].vdim))
        return model[0](x, key, value, average_attn_weights=False)
    if name == "BERT":
        attention = model.encoder.layer[0].attention
        hidden, weights = attention.self(x)[:2]
        return attention.output.dense(hidden), weights
    if name == "GPT-2":
        return model.h[0].attn(x)[:2]
    if name == "ViT":
        layers = model.layers if hasattr(model, "layers") else model.encoder.layer
        return layers[0].attention(x)[:2]
    if name == "Llama":
        size = model.layers[0].self_attn.head_dim
        turn = (torch.ones(1, x.shape[1], size).double(), torch.zeros(1, x.shape[1], size).double())  # no rotation
        return model.layers[0].self_attn(x, position_embeddings=turn, attention_mask=None)[:2]
    seen = []
    model[0].fused_attn = False
    handle = model[0].attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))
    output = model[0](x)
    handle.remove()
    return output, seen[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_output_value_products_are_what_the_attention_does_to_one_token(name):
    """A single token attends to itself with probability 1: the output is the sum over heads of W_O W_V x."""
    model = make(name)
    x = torch.randn(5, 1, 12, dtype=torch.float64)
    products = [torch.matmul(*pair.factors()).sum(0) for pair in pairs_of(name, model) if "output_value" in pair.name]
    found = sum(x[..., : product.shape[1]] @ product.mT for product in products)
    torch.testing.assert_close(found, attend(name, model, x)[0], **EXACT)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "Llama"])
def test_the_query_key_products_are_what_scores(name):
    """Logarithms of probabilities differ by x_i W_Q^T W_K (x_j - x_k) / sqrt(head_dim), in every head."""
    model = make(name)
    x = torch.randn(1, 3, 12, dtype=torch.float64) / 10
    (pair,) = (pair for pair in pairs_of(name, model) if "query_key" in pair.name)
    u, vt = pair.factors()
    assert u.shape[0] == 3
    probabilities = attend(name, model, x)[1][0]
    for head, product in enumerate(torch.matmul(u, vt)):
        difference = (x[0, 0] - x[0, 1])[: product.shape[1]]
        expected = x[0, 2] @ product @ difference / 4**0.5
        found = probabilities[head, 2, 0].log() - probabilities[head, 2, 1].log()
        tolerance = {"rtol": 1e-5, "atol": 0} if name == "ViT" else EXACT  # it takes the softmax in float32
        torch.testing.assert_close(found, expected, **tolerance)


def dense_products(name, model):
    """W_Q,h^T W_K,h and W_O,h W_V,h of every head, written out."""
    size = 2 if name == "Llama" else 4
    if name == "torch":
        query, key, value = model[0].in_proj_weight.chunk(3)
        output = model[0].out_proj.weight
    elif name.startswith("torch"):
        query, key, value = model[0].q_proj_weight, model[0].k_proj_weight, model[0].v_proj_weight
        output = model[0].out_proj.weight
    elif name == "timm":
        query, key, value = model[0].qkv.weight.chunk(3)
        output = model[0].proj.weight
    elif name == "GPT-2":
        query, key, value = model.h[0].attn.c_attn.weight.T.chunk(3)
        output = model.h[0].attn.c_proj.weight.T
    else:
        state = {
            key: value for key, value in model.named_parameters() if ("weight" in key and "ttention" in key) or "attn" in key
        }

        def find(*parts):
            return next(value for key, value in state.items() if key.rsplit(".", 2)[-2] in parts)

        query, key, value = find("query", "q_proj"), find("key", "k_proj"), find("value", "v_proj")
        output = find("dense", "o_proj")
    shared = len(query) // len(key)
    for head in range(len(query) // size):
        rows = slice(head * size, (head + 1) * size)
        served = slice(head // shared * size, (head // shared + 1) * size)
        yield "query_key", query[rows].T @ key[served]
        yield "output_value", output[:, rows] @ value[served]


@pytest.mark.parametrize("name", MODELS)
def test_the_penalty_is_that_of_the_dense_products_of_all_heads(name):
    model = make(name)
    kinds = ("output_value",) if name == "Llama" else ("query_key", "output_value")
    penalty = COEF / 2 * sum(product.square().sum() for kind, product in dense_products(name, model) if kind in kinds)
    pairs = pairs_of(name, model)
    assert len(pairs) == (3 if name == "Llama" else 2)
    decay = FrobeniusDecay(nn.ModuleList(), COEF, pairs=pairs)
    torch.testing.assert_close(decay.penalty(), penalty, **EXACT)
    covered = decay.parameters()
    expected = torch.autograd.grad(penalty, covered)
    decay.step()
    for parameter, grad in zip(covered, expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, **EXACT)
    groups = {group["name"]: group for group in param_groups(model, weight_decay=0.1, decay=decay)}
    assert {id(p) for p in groups["factors"]["params"]} == {id(p) for p in covered}


def test_pairs_beside_factorized_layers():
    """Attention by its heads, everything else by layers; no Parameter is in both."""
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(12, 3, 24, batch_first=True), 2, enable_nested_tensor=False
    ).double()
    config = LowRankConfig(0.25, rank_of="min")
    factorize_(model, config, filter_fn=lambda module, name: "self_attn" not in name)
    decay = FrobeniusDecay(model, COEF, pairs=attention_pairs(model, ignore_biases=True))
    assert len(decay.pairs) == 4
    model(torch.randn(2, 5, 12).double()).sum().backward()
    decay.step()
    factorize_(model, config)
    with pytest.raises(ValueError, match=r"a projection of attention 'layers.0.self_attn' is not an ordinary layer \(Fact"):
        attention_pairs(model, ignore_biases=True)


def test_dense_projections_that_were_unpacked():
    model = make("torch")
    products = [torch.matmul(*pair.factors()).detach().clone() for pair in attention_pairs(model, ignore_biases=True)]
    factorize_(model, LowRankConfig(1.0), filter_fn=lambda module, name: name.endswith("q_proj"), skip_growing=False)
    assert isinstance(model[0].q_proj, FactorizedLinear)
    model[0].q_proj = model[0].q_proj.to_layer()
    for pair, expected in zip(attention_pairs(model, ignore_biases=True), products, strict=True):
        torch.testing.assert_close(torch.matmul(*pair.factors()), expected)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: torch_attention(), {}, r"attention '0': query or key has a bias; pass ignore_biases=True"),
        (bert, {}, r"attention 'encoder.layer.0.attention.self': query or key has a bias"),
        (gpt2, {}, r"attention 'h.0.attn': query or key has a bias"),
        (vit, {}, r"query or key has a bias"),
        (llama, {}, r"attention 'layers.0.self_attn': rotary positions act between query and key; pass query_key=False"),
        (llama, {"ignore_biases": True}, r"rotary positions act between"),
        (lambda: timm_attention(qk_norm=True, norm_layer=nn.LayerNorm), {}, r"'0': normalizations act between"),
        (
            lambda: timm_attention(scale_norm=True, norm_layer=nn.LayerNorm),
            {"query_key": False},
            r"W_O W_V alone does not give the output of attention '0': a normalization acts between value and output; pass",
        ),
        (lambda: nn.Sequential(nn.Linear(4, 4)), {}, "found no attention in Sequential"),
        (lambda: torch_attention(bias=False), {"query_key": False, "output_value": False}, "no product was requested"),
    ],
)
def test_products_that_are_not_what_acts_are_refused_by_name(make, options, message):
    with pytest.raises(ValueError, match=message):
        attention_pairs(make(), **options)


def test_heads_that_are_stored_one_by_one_are_refused():
    tiny_vit = pytest.importorskip("timm.models.tiny_vit")
    model = nn.Sequential(tiny_vit.Attention(12, 4, 3, attn_ratio=1, resolution=(2, 2)))
    with pytest.raises(
        ValueError, match=r"attention '0' \(timm.models.tiny_vit\) stores queries, keys and values head by head"
    ):
        attention_pairs(model, ignore_biases=True, output_value=False)


def test_weight_decay_that_a_part_of_a_parameter_loses_is_named():
    model = torch_attention()
    decay = FrobeniusDecay(model, COEF, pairs=attention_pairs(model, query_key=False), decoupled=True)
    with pytest.warns(UserWarning, match=r"only a part of 1 Parameters, such as '0.in_proj_weight'. The rest of them gets no"):
        param_groups(model, weight_decay=0.1, decay=decay)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        param_groups(model, weight_decay=0.1, decay=decay, factor_weight_decay=0.1)
        param_groups(model, weight_decay=0.1, decay=decay, factor_weight_decay=0.0)
        param_groups(model, weight_decay=0.0, decay=decay)
        whole = FrobeniusDecay(model, COEF, pairs=attention_pairs(model, ignore_biases=True))
        param_groups(model, weight_decay=0.1, decay=whole)


def test_attention_without_biases_needs_no_word():
    assert [pair.name for pair in attention_pairs(torch_attention(bias=False))] == ["0.query_key", "0.output_value"]
