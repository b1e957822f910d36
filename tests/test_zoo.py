"""Networks of timm and transformers, of random weights: factorized, trained a step, folded, saved and loaded. Slow."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from common import FrobeniusDecay, LowRankConfig, densify_, factorize_, load_factorized_, param_groups

pytestmark = pytest.mark.slow

IMAGE_NETWORKS = """
    resnet18 resnet26 resnext50_32x4d seresnext26d_32x4d res2net50_26w_4s regnetx_002 regnety_002 densenet121 vgg11
    dla34 hrnet_w18_small efficientnet_b0 tf_efficientnet_b0 mobilenetv2_050 mobilenetv3_small_050 mnasnet_small
    fbnetc_100 ghostnet_100 lcnet_050 tinynet_e rexnet_100 repvgg_a0 mobileone_s0 fastvit_t8 nf_regnet_b0 inception_v3
    convnext_atto convnextv2_atto poolformer_s12 mixer_s32_224 resmlp_12_224 gmlp_s16_224 vit_tiny_patch16_224
    deit_tiny_patch16_224 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 pvt_v2_b0 edgenext_xx_small mobilevit_xxs
    mobilevitv2_050 crossvit_tiny_240 cait_xxs24_224 xcit_nano_12_p16_224 levit_128s efficientformer_l1 visformer_tiny
    twins_pcpvt_small pit_ti_224
""".split()
rows = []


def image_network(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=10)
    channels, height, width = model.default_cfg["input_size"]
    return model, {"x": torch.randn(2, channels, height, width)}


def language_network(name):
    transformers = pytest.importorskip("transformers")
    options, inputs = LANGUAGE_NETWORKS[name]
    config = getattr(transformers, name).config_class(**options)
    drawn = {key: torch.randint(3, 64, shape) if "ids" in key else torch.randn(shape) for key, shape in inputs.items()}
    return getattr(transformers, name)(config), drawn


WORDS = {"input_ids": (2, 9)}
ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NARROW = {"vocab_size": 64, "intermediate_size": 64, **ENCODER}
LANGUAGE_NETWORKS = {  # options of the configuration, and shapes of the inputs
    "BertForMaskedLM": (NARROW, WORDS),
    "RobertaModel": (NARROW, WORDS),
    "DistilBertForMaskedLM": ({"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, WORDS),
    "GPT2LMHeadModel": (
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
        WORDS,
    ),
    "OPTForCausalLM": ({"vocab_size": 64, "ffn_dim": 64, "word_embed_proj_dim": 32, **ENCODER}, WORDS),
    "LlamaForCausalLM": ({"num_key_value_heads": 2, **NARROW}, WORDS),
    "T5ForConditionalGeneration": (
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        {**WORDS, "decoder_input_ids": (2, 7)},
    ),
    "BartModel": (
        {
            "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        },
        WORDS,
    ),
    "ViTForImageClassification": (
        {"image_size": 16, "patch_size": 4, "intermediate_size": 64, **ENCODER},
        {"pixel_values": (2, 3, 16, 16)},
    ),
    "Wav2Vec2Model": (
        {
            "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, **NARROW,
        },
        {"input_values": (2, 400)},
    ),
}  # fmt: skip
NETWORKS = {name: partial(image_network, name) for name in IMAGE_NETWORKS}
NETWORKS |= {name: partial(language_network, name) for name in LANGUAGE_NETWORKS}


def output_of(model, inputs):
    found = model(**inputs)
    return found if isinstance(found, torch.Tensor) else found[0]


@torch.no_grad()
def settle_(model, inputs):
    """Weights that start at zero get values, so that each layer acts on the output, and normalization its statistics."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    normalizations = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if normalizations:
        for module in normalizations:
            module.momentum = 1.0
        output_of(model.train(), inputs)
    model.eval()


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    print(f"\n{'network':<30} {'layers':>6} {'skipped':>7} {'ratio':>6} {'error':>8}")
    for name, layers, skipped, ratio, error in rows:
        print(f"{name:<30} {layers:>6} {skipped:>7} {ratio:>6.3f} {error:>8.1e}")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_factorized_trained_folded_saved_and_loaded(name):
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    settle_(model, inputs)
    dense = copy.deepcopy(model)
    report = factorize_(model, LowRankConfig(0.25, rank_of="min"), unsupported="skip", skip_growing=True)
    assert report.layers
    assert not report.growing
    assert report.ratio < 1
    decay = FrobeniusDecay(model, 1e-4)
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=1e-4, decay=decay), lr=1e-4)
    output_of(model, inputs).square().mean().backward()
    before = {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(grad.isfinite().all() for grad in before.values())
    decay.step()
    assert all(factor.grad.isfinite().all() for factor in decay.parameters())
    optimizer.step()

    with torch.no_grad():
        expected = output_of(model, inputs)
        loaded = copy.deepcopy(dense)
        again = load_factorized_(loaded, model.state_dict())
        assert again.compressed == report.compressed
        torch.testing.assert_close(output_of(loaded, inputs), expected, rtol=1e-4, atol=1e-5)
        densify_(model)
        assert [type(module) for module in model.modules()] == [_plain(type(module)) for module in dense.modules()]
        assert model.state_dict().keys() == dense.state_dict().keys()
        found = output_of(model, inputs)
    error = (torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)).item()
    rows.append((name, len(report.layers), len(report.skipped), report.ratio, error))
    assert error <= 1e-4


def _plain(kind):
    return nn.Linear if kind is nn.modules.linear.NonDynamicallyQuantizableLinear else kind
