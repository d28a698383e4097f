"""Tiny models with random weights and a tokenizer of their own, so that no hub is needed."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

WORDS = 2000
VOCABULARY = 1024
KINDS = ("gqa", "mla", "windows", "wide")


def make_model(kind: str, directory: Path) -> Path:
    """A model of one of `KINDS` with weights of a fixed seed; made once."""
    target = directory / kind
    if not (target / "done").exists():
        import torch

        _tokenizer().save_pretrained(target)
        torch.manual_seed(0)
        _model(kind).to(torch.float32).save_pretrained(target)
        (target / "done").touch()
    return target


def prompt(generator: random.Random, words: int) -> str:
    """Random words; each is about 2.5 tokens."""
    return " ".join(f"w{generator.randrange(WORDS)}" for _ in range(words))


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    generator = random.Random(1)
    texts = [prompt(generator, 30) for _ in range(500)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def _model(kind: str) -> Any:
    import transformers

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "max_position_embeddings": 8192,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    if kind == "gqa":
        config = transformers.LlamaConfig(
            **common, num_hidden_layers=4, num_key_value_heads=4, head_dim=32
        )
        return transformers.LlamaForCausalLM(config)
    if kind == "wide":  # 32 KiB of KV cache per token in float32
        config = transformers.LlamaConfig(
            **common | {"num_attention_heads": 16},
            num_hidden_layers=4,
            num_key_value_heads=16,
            head_dim=64,
        )
        return transformers.LlamaForCausalLM(config)
    if kind == "windows":
        config = transformers.Gemma3TextConfig(
            **common,
            num_hidden_layers=6,
            num_key_value_heads=4,
            head_dim=32,
            sliding_window=256,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        )
        return transformers.Gemma3ForCausalLM(config)
    if kind == "mla":
        config = transformers.DeepseekV2Config(
            **common | {"initializer_range": 0.05},
            num_hidden_layers=3,
            num_key_value_heads=8,
            first_k_dense_replace=3,
            kv_lora_rank=512,
            q_lora_rank=None,
            qk_rope_head_dim=64,
            qk_nope_head_dim=32,
            v_head_dim=32,
            n_routed_experts=4,  # in layers after the dense ones, of which there are none
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
        )
        return transformers.DeepseekV2ForCausalLM(config)
    raise ValueError(f"kind is {kind!r}, expected one of {KINDS}")


def main() -> None:
    """``python -m harness.models KIND DIRECTORY``"""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("directory", type=Path)
    given = parser.parse_args()
    print(make_model(given.kind, given.directory))


if __name__ == "__main__":
    main()
