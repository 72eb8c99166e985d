"""Tokenizers with the special tokens and chat templates of published models, one token a byte or a character."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3 = (
    '{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}'
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] | trim if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# An end that is text, of a tokenizer that knows no token for it.
TEXTUAL = "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n###{% endfor %}"


@dataclass(frozen=True)
class Layout:
    """special: its special tokens, of which eos ends a text and bos begins it, or does not (adds_bos)."""

    template: str | None
    special: tuple[str, ...]
    eos: str | None
    bos: str | None = None
    adds_bos: bool = False
    spaced: bool = False  # Llama 2's kind: puts a space in front of any text


LAYOUTS = {
    "Gemma": Layout(GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>", True),
    "Qwen2 base": Layout(CHATML, ("<|im_start|>", "<|im_end|>"), "<|endoftext|>"),
    "SmolLM2": Layout(CHATML, (), "<|im_end|>", "<|im_start|>"),
    "Llama 3": Layout(
        LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        *("<|end_of_text|>", "<|begin_of_text|>", True),
    ),
    "Phi 3": Layout(PHI3, ("<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>", "<s>", True),
    "Mistral": Layout(MISTRAL, (), "</s>", "<s>", True),
    "Llama 2": Layout(LLAMA2, (), "</s>", "<s>", True, spaced=True),
    "Qwen3": Layout(QWEN3, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "an end in text": Layout(TEXTUAL, (), "</s>"),
    "Pythia": Layout(None, (), "<|endoftext|>", "<|endoftext|>"),
}


def layout_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a layout; its ids are below 300."""
    layout = LAYOUTS[name]
    named = [token for token in (layout.bos, layout.eos) if token]
    special = list(dict.fromkeys(["<pad>", *named, *layout.special]))
    if layout.spaced:
        units = [f"<0x{byte:02X}>" for byte in range(128)] + ["▁", *map(chr, range(33, 127))]
    else:
        units = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *units])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=layout.spaced))
    if layout.spaced:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    if layout.adds_bos:
        begin = [(layout.bos, vocabulary[layout.bos])]
        backend.post_processor = processors.TemplateProcessing(single=f"{layout.bos} $A", special_tokens=begin)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token=layout.bos,
        eos_token=layout.eos,
        extra_special_tokens=list(layout.special),
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = layout.template
    return made
