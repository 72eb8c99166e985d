"""The pad token of a saved scorer. transformers alone reads a row of a batch at its last token that is no padding, by
the id: so that id must be named, and must never end a sequence."""

from __future__ import annotations

import copy

import transformers

from rdo.sequences.forward import decoder_head

NEW = "<|pad|>"


def name_padding(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, adapter: bool = False
) -> tuple[transformers.PreTrainedTokenizerBase, str]:
    """Names one pad token in the config of a scorer on a decoder, and in a copy of its tokenizer, which is returned.

    With it comes one line where that is not enough, "" otherwise. An adapter's config is its base's, which may name
    another. Where no token will do, the config names none: transformers then scores one text at a time, as we do, and
    refuses a batch.
    """
    if not hasattr(model.config, "rdo_form") or decoder_head(model) is None:
        return tokenizer, ""
    tokenizer, config = copy.deepcopy(tokenizer), model.config.get_text_config()
    token, before = find_padding(tokenizer, model), getattr(config, "pad_token_id", None)
    if token is None:
        tokenizer.pad_token = None
    else:
        tokenizer.add_special_tokens({"pad_token": token})
    config.pad_token_id = tokenizer.pad_token_id
    said = [] if token else ["one text at a time"]
    if adapter and config.pad_token_id != before:
        said.append(f"by from_pretrained(..., pad_token_id={config.pad_token_id})")
    return tokenizer, "transformers alone scores " + ", ".join(said) if said else ""


def find_padding(tokenizer: transformers.PreTrainedTokenizerBase, model: transformers.PreTrainedModel) -> str | None:
    """A special token that has an embedding and ends nothing: the pad token, one that was meant for padding but is not
    declared, a new one where there are more embeddings than tokens, a reserved or an unknown token; else None."""
    config, written = model.config.get_text_config(), getattr(tokenizer, "chat_template", None)
    declared = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id, *declared}
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    fit = [t for t, number in special.items() if number < config.vocab_size and number not in ends]
    # What a chat template writes may be the end of a turn.
    fit = [token for token in fit if token not in str(written)]
    found = [token for token in fit if token == tokenizer.pad_token]
    found += [token for token in fit if "pad" in token.lower()]
    found += [NEW] if len(tokenizer) < config.vocab_size else []
    found += [token for token in fit if "reserved" in token or token == tokenizer.unk_token]
    return found[0] if found else None
