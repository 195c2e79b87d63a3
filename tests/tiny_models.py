"""Small models of OpenAI's clip and of transformers, with weights that are random but not dull."""

import importlib

import pytest
import torch
from test_zero_shot import TOKENIZER

from calibclip import ZeroShotClassifier

transformers = pytest.importorskip("transformers")

NAMES = ["tabby cat", "golden retriever", "lake"]
PROMPTS = [f"This is a photo of a {name}" for name in NAMES]
WORDS = "this is a photo of tabby cat golden retriever lake".split()
TRANSFORMER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TOWER = {**TRANSFORMER, "image_size": 32, "patch_size": 8}


def tiny_openai(clip, vision_layers=2):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = clip.model.CLIP(16, 32, vision_layers, 64, 8, 77, 49408, 64, 2, 2)
    return disturb(model).eval()


def disturb(model):
    """Move norms off the identity they start at, or a norm left out would not show."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "ln_" in name or "layernorm" in name or "layer_norm" in name or "layrnorm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def clip_tokenizer():
    # The same vocabulary; its first and last marks have other names in open_clip.
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(word, word): i for word, i in TOKENIZER.encoder.items()}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=list(TOKENIZER.bpe_ranks))


def tiny_hf_clip():
    text = {**TRANSFORMER, "vocab_size": 49408, "max_position_embeddings": 16}
    # The numbers of the real vocabulary, which the configuration's defaults are not.
    text |= {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    config = transformers.CLIPConfig(text_config=text, vision_config=TOWER, projection_dim=24)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(config)
    # Larger weights than the configuration gives: images and prompts are to differ.
    for tower in (model.vision_model, model.text_model):
        for parameter in tower.encoder.parameters():
            parameter.data *= 3
    return disturb(model).eval()


def clip_processor(**options):
    options = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, **options}
    return transformers.CLIPProcessor(transformers.CLIPImageProcessor(**options), clip_tokenizer())


def siglip_tokenizer():
    tokenizers = importlib.import_module("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer = tokenizers.normalizers.Lowercase()
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=["input_ids"],  # no attention mask, as the published SigLIPs
    )


def tiny_siglip():
    text = {**TRANSFORMER, "vocab_size": 16, "max_position_embeddings": 12, "projection_size": 32}
    config = transformers.SiglipConfig(text_config=text, vision_config=TOWER)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.SiglipModel(config)
    model.logit_scale.data.fill_(2.0)
    model.logit_bias.data.fill_(-5.0)
    return disturb(model).eval()


def siglip_processor(**options):
    options = {"size": {"height": 32, "width": 32}, **options}
    images = transformers.SiglipImageProcessor(**options)
    return transformers.SiglipProcessor(images, siglip_tokenizer())


def from_openai(clip, model, **options):
    return ZeroShotClassifier.from_openai_clip(model, clip.tokenize, NAMES, **options)


def from_hf(model, processor, **options):
    return ZeroShotClassifier.from_transformers(model, processor, NAMES, **options)
