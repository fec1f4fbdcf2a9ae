"""Files by which other tools (transformers, transformers.js, onnxruntime-genai) read the same bundle."""

from typing import Any

from gptedge_models import GPTConfig

from .vocabulary import END_OF_TEXT, GPT2_PATTERN, Vocabulary


def companions(config: GPTConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """File name -> JSON document."""
    eos = vocabulary.eos_token_id
    ends = {} if eos is None else {"bos_token_id": eos, "eos_token_id": eos}
    named = {} if eos is None else {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    return {
        "config.json": _config(config) | ends,
        "generation_config.json": {"do_sample": False} | ends,
        "genai_config.json": _genai(config, eos),
        "tokenizer.json": vocabulary.to_hugging_face(),
        "tokenizer_config.json": {
            # to transformers 5, GPT2Tokenizer splits as GPT-2 does, whatever tokenizer.json says
            "tokenizer_class": "GPT2Tokenizer" if vocabulary.pattern == GPT2_PATTERN else "PreTrainedTokenizerFast",
            "model_max_length": config.context_length,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            **named,
        },
    }


def _config(config: GPTConfig) -> dict[str, Any]:
    """The names of transformers' GPT2Config; to transformers.js, fp32 is onnx/model.onnx, with one file of weights."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu" if config.exact_gelu else "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_ctx": config.context_length,
        "n_positions": config.context_length,
        "n_embd": config.emb_dim,
        "n_head": config.n_heads,
        "n_layer": config.n_layers,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": False,
        "transformers.js_config": {"dtype": "fp32", "use_external_data_format": {"model.onnx": 1}},
    }


def _genai(config: GPTConfig, eos: int | None) -> dict[str, Any]:
    """onnxruntime-genai: its type ``decoder`` reads this cache layout; its type ``gpt2`` wants another."""
    end = config.vocab_size - 1 if eos is None else eos  # the file must name one
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "onnx/model.onnx",
        "head_size": config.head_dim,
        "hidden_size": config.emb_dim,
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    context = config.context_length
    model = {"type": "decoder", "decoder": decoder, "vocab_size": config.vocab_size, "context_length": context}
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    search = {"do_sample": False, "max_length": context, "num_beams": 1, "past_present_share_buffer": False}
    return {"model": model | ends, "search": search}
