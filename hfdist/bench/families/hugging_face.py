"""Hugging Face's models, from tiny configurations: nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfdist.bench.families.family import Family, cross_entropy, normal

VOCABULARY, LENGTH = 7, 3


def _made(model: str, config: str, **settings: Any) -> nn.Module:
    """A random model of `transformers`: class names, and the configuration's values."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the library is imported
    import transformers

    attention = settings.pop("attention", None)
    made = getattr(transformers, config)(**settings)
    if attention is not None:
        made._attn_implementation = attention
    return getattr(transformers, model)(made)


def _text() -> dict[str, Tensor]:
    """Two texts, one of them padded on the right."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    ids = torch.randint(3, VOCABULARY, mask.shape)
    labels = torch.randint(VOCABULARY, mask.shape)
    return {
        "input_ids": ids.masked_fill(mask == 0, 0),
        "attention_mask": mask,
        "labels": labels.masked_fill(mask == 0, -100),
    }


def _classified() -> dict[str, Tensor]:
    return _text() | {"labels": torch.randint(3, (2,))}


def _translated() -> dict[str, Tensor]:
    return _text() | {"decoder_input_ids": torch.randint(3, VOCABULARY, (2, LENGTH))}


def _pictures(size: int = 8) -> dict[str, Tensor]:
    return {"pixel_values": normal(3, 3, size, size), "labels": torch.randint(3, (3,))}


def _own_causal(logits: Tensor, batch: Any) -> Tensor:
    """What a causal model of `transformers` returns as its loss: in float32, against the next token."""
    shifted = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.float().flatten(0, 1), shifted.flatten())


def _logits(outputs: Any) -> Tensor:
    return outputs.logits


def families() -> list[Family]:
    """In the order of the table."""
    family = partial(Family, source="transformers", logits=_logits)
    small: dict[str, Any] = {
        "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12,
        "vocab_size": VOCABULARY, "max_position_embeddings": 16,
    }  # fmt: skip
    decoder: dict[str, Any] = small | {"num_key_value_heads": 1, "head_dim": 4, "pad_token_id": 0}
    pictured: dict[str, Any] = small | {"image_size": 8, "patch_size": 4, "num_labels": 3}
    seq2seq: dict[str, Any] = {
        "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12,
        "vocab_size": VOCABULARY, "max_position_embeddings": 16,
    }  # fmt: skip
    gpt2: dict[str, Any] = {
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "vocab_size": VOCABULARY,
        "n_positions": 16,
    }
    t5: dict[str, Any] = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2,
          "vocab_size": VOCABULARY, "decoder_start_token_id": 0}  # fmt: skip

    # Their norms are computed in float32, whatever the model's dtype.
    rounded: dict[str, Any] = {"tolerance": 1e-5}

    def of(name: str, model: str, config: str, batch: Callable[[], Any] = _text,
           settings: dict[str, Any] = decoder, **more: Any) -> Family:  # fmt: skip
        own = {key: more.pop(key) for key in tuple(more) if key in Family.__dataclass_fields__}
        make = partial(_made, model, config, **settings, **more)
        return family(name=name, model=make, batch=batch, **own)

    # The grouped matrix product of torch has no float64.
    experts: dict[str, Any] = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
    return [
        of("BERT, masked tokens", "BertForMaskedLM", "BertConfig", settings=small),
        of("BERT, masked tokens, training", "BertForMaskedLM", "BertConfig", settings=small,
           training=True),
        of("BERT, classes, its own loss", "BertForSequenceClassification", "BertConfig",
           _classified, small, num_labels=3, own_loss=True),
        of("BERT, eager attention", "BertForMaskedLM", "BertConfig", settings=small,
           attention="eager"),
        of("ALBERT", "AlbertForMaskedLM", "AlbertConfig", settings=small, embedding_size=4,
           num_hidden_groups=1),
        of("DeBERTa v2", "DebertaV2ForMaskedLM", "DebertaV2Config", settings=small,
           relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4),
        of("GPT-2", "GPT2LMHeadModel", "GPT2Config", settings=gpt2),
        of("GPT-2, its own loss", "GPT2LMHeadModel", "GPT2Config", settings=gpt2, own_loss=True,
           criterion=_own_causal, tolerance=1e-5),
        of("BLOOM", "BloomForCausalLM", "BloomConfig",
           settings={"hidden_size": 8, "n_layer": 1, "n_head": 2, "vocab_size": VOCABULARY}),
        of("OPT", "OPTForCausalLM", "OPTConfig", settings=small, ffn_dim=12, word_embed_proj_dim=8),
        of("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig", settings=small),
        of("Falcon", "FalconForCausalLM", "FalconConfig", settings=small),
        of("Llama, grouped queries", "LlamaForCausalLM", "LlamaConfig", **rounded),
        of("Llama, grouped queries, its own loss", "LlamaForCausalLM", "LlamaConfig", own_loss=True,
           criterion=_own_causal, tolerance=1e-5),
        of("Gemma 2", "Gemma2ForCausalLM", "Gemma2Config", attention="eager",
           **rounded),
        of("Phi", "PhiForCausalLM", "PhiConfig", settings=small),
        of("Qwen 3", "Qwen3ForCausalLM", "Qwen3Config", **rounded),
        of("Mixtral", "MixtralForCausalLM", "MixtralConfig", num_local_experts=3,
           **experts, **rounded),
        of("Qwen 2, experts", "Qwen2MoeForCausalLM", "Qwen2MoeConfig", num_experts=3,
           moe_intermediate_size=6, shared_expert_intermediate_size=6, **experts,
           **rounded),
        of("Mamba", "MambaForCausalLM", "MambaConfig", settings={
            "hidden_size": 8, "state_size": 3, "num_hidden_layers": 1, "vocab_size": VOCABULARY}, **rounded),
        of("T5", "T5ForConditionalGeneration", "T5Config", _translated, t5, training=True,
           **rounded),
        of("BART", "BartForConditionalGeneration", "BartConfig", _translated, seq2seq),
        of("Whisper", "WhisperForConditionalGeneration", "WhisperConfig", lambda: {
            "input_features": normal(2, 4, 8), "decoder_input_ids": torch.randint(VOCABULARY, (2, 3)),
            "labels": torch.randint(VOCABULARY, (2, 3))},
            {k: v for k, v in seq2seq.items() if k != "max_position_embeddings"} | {
                "num_mel_bins": 4, "max_source_positions": 4, "max_target_positions": 8,
                "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                "decoder_start_token_id": 1}),
        of("ViT", "ViTForImageClassification", "ViTConfig", _pictures, pictured),
        of("ViT, its own loss", "ViTForImageClassification", "ViTConfig", _pictures, pictured,
           own_loss=True),
        of("DINOv2", "Dinov2ForImageClassification", "Dinov2Config", _pictures, pictured),
        of("SegFormer", "SegformerForSemanticSegmentation", "SegformerConfig", lambda: {
            "pixel_values": normal(1, 3, 16, 16), "labels": torch.randint(3, (1, 4, 4))},
            {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [4, 8],
             "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2],
             "mlp_ratios": [2, 2], "decoder_hidden_size": 8, "num_labels": 3},
            criterion=lambda z, b: cross_entropy(z.movedim(1, -1), b)),
        of("ConvNeXt v2", "ConvNextV2ForImageClassification", "ConvNextV2Config",
           lambda: _pictures(16), {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2,
                                   "patch_size": 4, "num_labels": 3}),
        of("Wav2Vec2", "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", lambda: {
            "input_values": normal(2, 80), "labels": torch.randint(3, (2,))},
            small | {"conv_dim": [4, 4], "conv_stride": [2, 2], "conv_kernel": [4, 3],
                     "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
                     "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 4,
                     "num_labels": 3, "apply_spec_augment": False}),
    ]  # fmt: skip
