"""Small models, tokenizers and chat templates for the scripts that learn from text. All are made here, by hand.

A token is a byte, or one of a family's special tokens, so any text can be written. The templates are short versions of
what the families publish: who speaks, where a turn ends, where a system turn and tools go, and what is refused.
"""

import contextlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}"
TEMPLATES = {  # family: special tokens, of which the first is the eos token; the bos token; the template
    "llama2": (["</s>", "<s>", "<unk>"], "<s>", """\
{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}\
{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}\
{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}\
{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}\
{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"""),
    "llama3": (["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"], "<|begin_of_text|>",
               "{{ bos_token }}" + TOOLS + """\
{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""),
    "qwen2": (["<|im_end|>", "<|endoftext|>", "<|im_start|>"], None, """\
{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"""
              + TOOLS + """\
{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""),
    "qwen3": (["<|im_end|>", "<|endoftext|>", "<|im_start|>"], None, TOOLS + """\
{% for m in messages %}{% set content = m.content.split('</think>')[-1].lstrip('\n') %}\
{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}\
{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}\
{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""),
    "gemma": (["<eos>", "<bos>", "<pad>", "<unk>", "<start_of_turn>", "<end_of_turn>"], "<bos>", """\
{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content }}\
{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""),
    "mistral": (["</s>", "<s>", "<unk>"], "<s>", """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}\
{% if tools and loop.first %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}\
{{ '[INST] ' + m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""),
    "thoughtless": (["<|im_end|>", "<|endoftext|>", "<|im_start|>"], None, """\
{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"""),
    "gpt2": (["<|endoftext|>"], "<|endoftext|>", None),
}  # fmt: skip
SIZES = {
    "gpt2": GPT2Config(n_positions=256, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3),
    "llama": LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         intermediate_size=32, max_position_embeddings=256, initializer_range=0.3),
}  # fmt: skip


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    special, bos, template = TEMPLATES[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    names = {"eos_token": special[0], "bos_token": bos}
    names |= {"unk_token": "<unk>"} if "<unk>" in special else {}
    names |= {"pad_token": "<pad>"} if "<pad>" in special else {}
    if bos and family != "gpt2":  # as a text is read; a chat template writes it itself
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


def save_model(
    folder: Path, size: str = "gpt2", family: str = "gemma", kind: type = AutoModelForCausalLM, **config: object
) -> Path:
    """A model with random weights, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer, sizes = tokenizer_of(family), SIZES[size]
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    config = type(sizes)(**sizes.to_diff_dict() | {"vocab_size": len(tokenizer)} | ids | config)
    kind.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def bfloat16_autocast() -> Iterator[None]:
    """As on a GPU: within it, runs have mixed precision."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it is one for the whole process
    with mock.patch.dict(os.environ, ACCELERATE_MIXED_PRECISION="bf16"):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs_of_words(count: int = 60, seed: int = 0) -> list[dict]:
    """Prompts and replies of very different lengths."""
    rng = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(rng.choices(["the", "cup", "is", "good", "bad", "music"], k=rng.randint(1, most)))

    return [{"prompt": f"{i} {text(3)}: ", "chosen": text(9), "rejected": text(9)} for i in range(count)]
