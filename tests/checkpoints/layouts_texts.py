"""Folders of text encoders as transformers and sentence-transformers write them, tiny, with random weights."""

import json
from functools import partial

import torch
from layouts import SMALL, Layout, folder_of, layout
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast

TEXTS = [
    "A man is eating a piece of bread.",
    "Two men pushed carts through the closed woods, one after another, until it was dark and cold outside!",
    "Horses",
    "A woman plays violin; naturellement, très vite.",
    "a",
]
ROWS: list[Layout] = []
row = partial(layout, rows=ROWS)  # the functions below write a folder, and give the reference
ROTARY = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
SIZES = {
    "albert": {**SMALL, "embedding_size": 16},
    "deberta": {**SMALL, "relative_attention": True, "pos_att_type": ["c2p"]},
    "deberta-v2": {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "distilbert": {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 48},
    "electra": {**SMALL, "embedding_size": 16},
    "eurobert": ROTARY, "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "mt5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, "gemma": ROTARY, "gemma2": ROTARY,
    "gemma3_text": ROTARY, "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}, "llama": ROTARY, "mistral": ROTARY,
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 32},
    "phi3": {**SMALL, "num_key_value_heads": 2}, "qwen2": {**SMALL, "num_key_value_heads": 2}, "qwen3": ROTARY,
}  # fmt: skip
FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet", "opt")


def tokeniser(folder, decoder=False, longest=24):
    """A tokeniser of its own for a folder, trained on TEXTS; of a decoder, bytes without marks at the ends."""
    if decoder:
        made = Tokenizer(models.BPE(unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    else:
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    made.train_from_iterator(TEXTS, trainer)
    if not decoder:
        made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]", model_max_length=longest
    )
    fast.save_pretrained(folder)
    return fast


def network(folder, kind, **more):
    """A tiny network of transformers, saved in a folder."""
    torch.manual_seed(0)
    size = SIZES.get(kind, SMALL) | {"vocab_size": 400, "pad_token_id": 0} | more
    config = AutoConfig.for_model(kind, **size)
    return folder_of(folder, AutoModel.from_config(config))


def alone(folder, pooled):
    """The vector of each text by transformers' own classes, one text at a time, so that nothing is padded."""
    tokens, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    net = model.encoder if model.config.is_encoder_decoder else model

    @torch.no_grad()
    def reference(texts):
        rows = []
        for text in texts:
            read = tokens(text, return_tensors="pt", truncation=True)
            rows.append(pooled(net(read["input_ids"], attention_mask=read["attention_mask"]).last_hidden_state[0]))
        return torch.stack(rows)

    return reference


def modules(folder, *names):
    """modules.json as sentence-transformers writes it, with a folder a module."""
    entries = []
    for index, name in enumerate(names):
        path = f"{index}_{name}" if index else ""
        (folder / path).mkdir(exist_ok=True)
        kind = f"sentence_transformers.models.{name}"
        entries.append({"idx": index, "name": str(index), "path": path, "type": kind})
    (folder / "modules.json").write_text(json.dumps(entries))


def pooling(folder, *modes):
    """1_Pooling/config.json as sentence-transformers 2 to 5 write it."""
    names = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    config = {f"pooling_mode_{name}": name in modes for name in names}
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 32, **config}))


@row("transformers, BERT, RoBERTa, XLM-R, DistilBERT, MPNet, ELECTRA, ALBERT, DeBERTa, ModernBERT, T5",
     "the mean of a text's pieces", flags="`--pool cls`, `max` or `last`")  # fmt: skip
def bare_encoder(folder):
    tokeniser(folder)
    network(folder, "bert")
    return alone(folder, lambda hidden: hidden.mean(0))


@row("transformers, Qwen, Llama, Mistral, Gemma, Phi, GPT-2, GPT-NeoX, OPT", "a text's last piece",
     flags="`--pool mean`, `cls` or `max`")  # fmt: skip
def bare_decoder(folder):
    tokeniser(folder, decoder=True)
    network(folder, "qwen2")
    return alone(folder, lambda hidden: hidden[-1])


@row("sentence-transformers", "the transformer, its Pooling and Normalize", flags="`--pool`")
def sentences(folder):
    tokeniser(folder)
    network(folder, "mpnet", pad_token_id=1)
    modules(folder, "Transformer", "Pooling", "Normalize")
    pooling(folder, "mean_tokens")
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24, "do_lower_case": False}))
    return alone(folder, lambda hidden: torch.nn.functional.normalize(hidden.mean(0), dim=0))


@row("sentence-transformers with Dense", "the transformer, its Pooling, and Dense with its activation")
def dense(folder):
    tokeniser(folder)
    network(folder, "distilbert")
    modules(folder, "Transformer", "Pooling", "Dense")
    pooling(folder, "cls_token", "mean_tokens")
    linear = torch.nn.Linear(64, 7)
    torch.save({f"linear.{k}": v for k, v in linear.state_dict().items()}, folder / "2_Dense/pytorch_model.bin")
    about = {"in_features": 64, "out_features": 7, "bias": True,
             "activation_function": "torch.nn.modules.activation.Tanh"}  # fmt: skip
    (folder / "2_Dense/config.json").write_text(json.dumps(about))
    return alone(folder, lambda hidden: torch.tanh(linear(torch.cat([hidden[0], hidden.mean(0)]))))
