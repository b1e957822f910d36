"""The Transformer as a fairseq model: its flags, its architectures, and the methods that fairseq's beam search calls."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from fairseq.models import (
    FairseqEncoder,
    FairseqEncoderDecoderModel,
    FairseqIncrementalDecoder,
    register_model,
    register_model_architecture,
)
from torch import Tensor

from common import FrobeniusDecay
from transformer_iwslt.config import ARCHITECTURES, CRITERIONS, DEFAULT_DECAY, ModelConfig
from transformer_iwslt.model import EOS, PAD, Decoder, Encoder, Transformer, TransformerConfig, frobenius_decay
from transformer_iwslt.plugin.optimizer import EXEMPT

# The fields of TransformerConfig that have flags.
_FLAGS = (
    "embed_dim", "ffn_dim", "layers", "heads", "dropout", "attention_dropout", "activation_dropout", "rank_scale", "init",
    "spectral_quekey", "spectral_outval",
)  # fmt: skip


class PluginEncoder(FairseqEncoder):
    """The encoder with fairseq's interface."""

    def __init__(self, dictionary: Any, encoder: Encoder) -> None:
        super().__init__(dictionary)
        self.net = encoder

    def forward(self, src_tokens: Tensor, src_lengths: Tensor | None = None, **_: Any) -> dict[str, Any]:
        encoded, mask = self.net(src_tokens)
        return {"encoded": encoded, "mask": mask}

    def reorder_encoder_out(self, encoder_out: dict[str, Any], new_order: Tensor) -> dict[str, Any]:
        return {key: None if value is None else value.index_select(0, new_order) for key, value in encoder_out.items()}

    def max_positions(self) -> int:
        return self.net.embed_positions.num_embeddings - PAD - 1


class PluginDecoder(FairseqIncrementalDecoder):
    """The decoder with fairseq's interface. Its state is kept in fairseq's dictionary of incremental state."""

    def __init__(self, dictionary: Any, decoder: Decoder) -> None:
        super().__init__(dictionary)
        self.net = decoder

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Any = None,
        incremental_state: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if incremental_state is None:
            return self.net(prev_output_tokens, self.net.start(encoder_out["encoded"], encoder_out["mask"])), None
        if "state" not in incremental_state:
            incremental_state["state"] = self.net.start(encoder_out["encoded"], encoder_out["mask"])
        state = incremental_state["state"]
        return self.net(prev_output_tokens[:, state.length :], state), None

    def reorder_incremental_state_scripting(self, incremental_state: dict[str, Any], new_order: Tensor) -> None:
        if "state" in incremental_state:
            incremental_state["state"].reorder(new_order)

    def max_positions(self) -> int:
        return self.net.embed_positions.num_embeddings - PAD - 1


@register_model("factorized_transformer")
class PluginModel(FairseqEncoderDecoderModel):
    """A :class:`Transformer` that fairseq trains; ``decay`` is its Frobenius decay."""

    def __init__(self, encoder: PluginEncoder, decoder: PluginDecoder) -> None:
        super().__init__(encoder, decoder)
        self.decay: FrobeniusDecay | None = None

    @staticmethod
    def add_args(parser: argparse.ArgumentParser) -> None:
        ModelConfig.add_flags(parser)

    @classmethod
    def build_model(cls, args: argparse.Namespace, task: Any) -> PluginModel:
        for dictionary in (task.source_dictionary, task.target_dictionary):
            if (dictionary.pad(), dictionary.eos()) != (PAD, EOS):
                raise ValueError(
                    f"a dictionary has <pad> and </s> at {dictionary.pad()} and {dictionary.eos()}, expected {PAD} and {EOS}"
                )
        if getattr(task.cfg, "left_pad_target", False):
            raise ValueError("--left-pad-target is not supported: targets are padded on the right")
        sizes = {name: getattr(args, name) for name in _FLAGS}
        transformer = Transformer(TransformerConfig(len(task.source_dictionary), len(task.target_dictionary), **sizes))
        encoder = PluginEncoder(task.source_dictionary, transformer.encoder)
        model = cls(encoder, PluginDecoder(task.target_dictionary, transformer.decoder))
        model.decay = frobenius_decay(model, args.frobenius_decay, args.wd2fd, args.wd2fd_quekey, args.wd2fd_outval)
        criterion = getattr(args, "criterion", None)
        if model.decay is not None and criterion is not None and criterion not in CRITERIONS.values():
            raise ValueError(f"Frobenius decay needs --criterion {' or '.join(CRITERIONS.values())}, got {criterion}")
        for parameter in () if model.decay is None else model.decay.parameters():
            setattr(parameter, EXEMPT, True)
        return model


def _architecture(sizes: dict[str, Any]) -> Callable[[argparse.Namespace], None]:
    def complete(args: argparse.Namespace) -> None:
        """Fill in what was not given. If fairseq's own program was called, the rules of train.py apply."""
        defaults = {
            **sizes,
            "rank_scale": 0.0,
            "init": "regular",
            "frobenius_decay": getattr(args, "weight_decay", 0) or DEFAULT_DECAY,
        }
        switches = ("spectral", "spectral_quekey", "spectral_outval", "wd2fd", "wd2fd_quekey", "wd2fd_outval")
        for name, value in (defaults | dict.fromkeys(switches, False)).items():
            if getattr(args, name, None) is None:
                setattr(args, name, value)
        args.init = "spectral" if args.spectral else args.init

    return complete


for _name, _sizes in ARCHITECTURES.items():
    register_model_architecture("factorized_transformer", _name)(_architecture(_sizes))
