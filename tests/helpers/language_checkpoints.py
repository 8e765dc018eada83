"""Tiny random checkpoints of the real ALIGN and CLIP classes, with tokenizers, as folders on disk."""

from pathlib import Path

import torch

WORDS = ["a", "photo", "of", "flawless", "damaged", "bottle", "metal", "nut", "wood"]


def save_align(folder: Path) -> Path:
    from transformers import AlignConfig, AlignModel, BertTokenizer, EfficientNetImageProcessor

    tokens = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    text = {
        "vocab_size": len(tokens), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 16, "initializer_range": 0.5,
    }  # fmt: skip
    vision = {
        "image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.3, "depth_divisor": 4, "hidden_dim": 80,
        "depthwise_padding": [],
    }  # fmt: skip
    torch.manual_seed(1)
    model = AlignModel(AlignConfig(text_config=text, vision_config=vision, projection_dim=80))
    model.save_pretrained(folder)
    BertTokenizer(vocab=tokens).save_pretrained(folder)
    EfficientNetImageProcessor(rescale_factor=1 / 127.5, rescale_offset=True, do_normalize=False).save_pretrained(
        folder
    )
    return folder


def save_clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    letters = sorted(set("".join(WORDS)))
    symbols = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    tokens = {symbol: i for i, symbol in enumerate(symbols)}
    text = {
        "vocab_size": len(tokens), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 40, "projection_dim": 12,
        "bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "initializer_factor": 10.0,
    }  # fmt: skip
    vision = {
        "image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 24, "projection_dim": 12,
    }  # fmt: skip
    torch.manual_seed(2)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    CLIPTokenizer(vocab=tokens, merges=[]).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return folder


SAVE = {"align": save_align, "clip": save_clip}
