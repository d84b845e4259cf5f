"""Folders of sound encoders as transformers writes them, tiny, with random weights."""

import warnings
from functools import partial

import numpy as np
import torch
import transformers
from layouts import SMALL, Layout, folder_of, layout
from transformers import AutoModel

RATE = 16_000
ROWS: list[Layout] = []
row = partial(layout, rows=ROWS)  # the functions below write a folder, and give the reference
CONVS = {"conv_dim": (16, 16, 16), "conv_kernel": (10, 8, 4), "conv_stride": (5, 8, 4), "num_feat_extract_layers": 3,
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip


def sounds(rate=RATE, seconds=(0.5, 0.5, 0.9, 0.31, 0.5)):
    """A few sounds: tones in noise, of several lengths."""
    rng = np.random.default_rng(0)
    made = []
    for number, length in enumerate(seconds):
        t = np.arange(int(length * rate)) / rate
        tone = np.sin(2 * np.pi * (300 + 200 * number) * t) * (0.1 + 0.1 * number)
        made.append((tone + 0.05 * rng.standard_normal(len(t))).astype(np.float32))
    return made


def saved(folder, config, extractor):
    """A network of a config in a folder, with its extractor."""
    torch.manual_seed(0)
    return folder_of(folder, AutoModel.from_config(config), extractor)


def alone(net, extractor, pooled):
    """The vector of each sound by transformers' own classes, one sound at a time."""

    @torch.no_grad()
    def reference(given):
        rows = []
        for samples in given:
            features = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt")
            features.pop("attention_mask", None)
            rows.append(pooled(net(**features), samples))
        return torch.cat(rows)

    return reference


def waves(folder, kind, **more):
    """One of the networks that take samples."""
    config = transformers.AutoConfig.for_model(kind, **SMALL, **CONVS, vocab_size=9, **more)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=more.get("feat_extract_norm") == "layer")
    return alone(saved(folder, config, extractor), extractor, lambda out, _: out.last_hidden_state.mean(1))


@row("transformers, wav2vec 2.0, HuBERT, WavLM, UniSpeech-SAT, data2vec-audio", "the mean over the steps of a sound")
def wave(folder):
    return waves(folder, "wav2vec2")


@row("transformers, Whisper", "the encoder, its mean over the steps of the sound, not of the silence that fills 30 s")
def whisper(folder):
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, decoder_layers=1,
        decoder_attention_heads=4, decoder_ffn_dim=48, vocab_size=60, num_mel_bins=16, max_source_positions=100,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    model = saved(folder, config, extractor)

    def pooled(out, samples):
        steps = int(np.ceil(np.ceil(len(samples) / 160) / 2))
        return out.last_hidden_state[:, :steps].mean(1)

    return alone(model.encoder, extractor, pooled)


@row("transformers, AST", "what its pooler gives")
def ast(folder):
    config = transformers.ASTConfig(**SMALL, max_length=64, num_mel_bins=32)
    extractor = transformers.ASTFeatureExtractor(max_length=64, num_mel_bins=32)
    return alone(saved(folder, config, extractor), extractor, lambda out, _: out.pooler_output)


@row("transformers, CLAP", "the audio tower and its projection: the sound's embedding; not the text tower")
def clap(folder, fusion=False):
    audio = {
        "hidden_size": 32, "patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [2, 4],
        "spec_size": 64, "num_mel_bins": 16, "window_size": 4, "num_hidden_layers": 2, "num_classes": 3,
        "enable_fusion": fusion, "aff_block_r": 2,
    }  # fmt: skip
    audio["hidden_size"] = 16
    text = {**SMALL, "vocab_size": 60, "max_position_embeddings": 20}
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bands without a frequency
        extractor = transformers.ClapFeatureExtractor(
            feature_size=16, sampling_rate=RATE, hop_length=160, max_length_s=1,
            truncation="fusion" if fusion else "rand_trunc",
        )  # fmt: skip
    model = saved(folder, config, extractor)

    def pooled(features, samples):
        no = torch.zeros(1, 1, dtype=torch.bool)  # of short sounds its extractor draws one that is to count as longer
        out = model.audio_model(input_features=features["input_features"], is_longer=no)
        return model.audio_projection(out.pooler_output)

    return alone(lambda **features: features, extractor, pooled)
