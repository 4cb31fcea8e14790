"""Typed reading of a Hugging Face `config.json`: every key is used, checked, known to be irrelevant, or refused.

A published configuration lists only what differs from its class's defaults, so the default given here must be
the Hugging Face class default. A key that would change the result and is not implemented raises by name and value.
"""

import math
from collections.abc import Mapping
from typing import Any

from minivlm.errors import InputError

# Written by transformers (v4 and v5) into any configuration; none of them changes a forward pass at inference.
_BOOKKEEPING = """
    _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures attention_dropout
    bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dropout dtype early_stopping encoder_no_repeat_ngram_size
    eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label ignore_index image_seq_length initializer_factor initializer_range is_decoder is_encoder_decoder
    label2id length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    projection_dim pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
"""
BOOKKEEPING = frozenset(_BOOKKEEPING.split())


class Fields:
    """Reads the keys of one JSON object and remembers which were read, so that `finish` can refuse the others."""

    def __init__(self, values: Mapping[str, Any], where: str):
        if not isinstance(values, Mapping):
            raise InputError(f"{where}: expected a JSON object, found {type(values).__name__}")
        self.values, self.where, self.read = values, where, set()

    def get(self, key: str, kind: type, default: Any) -> Any:
        """The value of `key`, checked to be a `kind` (an int is accepted for a float), or `default` when absent."""
        self.read.add(key)
        if key not in self.values:
            return default
        value = self.values[key]
        if value is None and default is None:
            return None
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        not_finite = isinstance(value, float) and not math.isfinite(value)  # JSON as Python reads it has NaN
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)) or not_finite:
            raise InputError(f"{self.where}: {key} = {value!r}, expected {kind.__name__}")
        return value

    def positive(self, key: str, default: int | None) -> Any:
        """An integer of at least 1 (or None where the default is None)."""
        value = self.get(key, int, default)
        if value is not None and value < 1:
            raise InputError(f"{self.where}: {key} = {value}, expected a positive integer")
        return value

    def positive_float(self, key: str, default: float) -> float:
        """A number above 0."""
        value = self.get(key, float, default)
        if value <= 0:
            raise InputError(f"{self.where}: {key} = {value}, expected a positive number")
        return value

    def only(self, key: str, implemented: Any, default: Any = None) -> None:
        """Refuse any value of `key` other than the implemented one; absent means `default` (or the implemented one)."""
        self.read.add(key)
        value = self.values.get(key, implemented if default is None else default)
        if value != implemented:
            raise InputError(f"{self.where}: {key} = {value!r} is not supported, only {implemented!r}")

    def finish(self) -> None:
        """Refuse keys nobody read: they might change the result."""
        unknown = sorted(set(self.values) - self.read - BOOKKEEPING)
        if unknown:
            shown = ", ".join(f"{key} = {self.values[key]!r}" for key in unknown)
            raise InputError(f"{self.where}: unknown {'keys' if len(unknown) > 1 else 'key'} {shown}")
