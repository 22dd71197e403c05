"""Toy models and tokenizers, made on the spot: small enough for hundreds of tests."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

BOS, START, END = "<|startoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "What is 12 + 7? The answer is 19.",
    "user assistant system one two three four five",
    "The capital of France is Paris; the sum of 2 and 2 is 4.",
]


def tiny_tokenizer(add_bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 300 tokens with a chat template and no pad token.

    Args:
        add_bos: Put a token before every text, as Llama's tokenizers do.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=[BOS, START, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if add_bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, raw.token_to_id(BOS))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A random Llama of two layers, fp32, in eval mode; `overrides` go to its config."""
    options = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**options, **overrides})).eval()
    # transformers starts at 0.02, where every softmax is flat and every mistake is small.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.15)
    return model


def tiny_gpt2(seed: int = 0, **overrides) -> GPT2LMHeadModel:
    """A random GPT-2 of two layers, fp32, in eval mode, whose linear layers are Conv1D."""
    options = {
        "vocab_size": 320,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**{**options, **overrides})).eval()


def plain_values(model, trees) -> torch.Tensor:
    """Log-probabilities of the scored tokens, one unpadded sequence at a time through the whole model."""
    values = []
    for tree in trees:
        for branch in tree.branches:
            row = torch.tensor([tree.prompt + branch.ids])
            logprobs = model(row, use_cache=False).logits[0].float().log_softmax(-1)
            for place, wanted in enumerate(branch.scored or (True,) * len(branch.ids), len(tree.prompt)):
                if wanted:
                    values.append(logprobs[place - 1, row[0, place]])
    return torch.stack(values)
