"""What is done to scores before an id is drawn, for the settings of a row, by transformers or written out in Python:
the oracles of the samplers.
"""

from collections.abc import Sequence

import transformers

from minivlm.sampler import Sampling


def transformers_warpers(sampling: Sampling) -> transformers.LogitsProcessorList:
    """In the order of GenerationMixin._get_logits_processor, as released in transformers 5.23."""
    chain = transformers.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chain.append(transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature is not None:
        chain.append(transformers.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        chain.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and sampling.top_p < 1:
        chain.append(transformers.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        chain.append(transformers.MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p is not None and sampling.typical_p < 1:
        chain.append(transformers.TypicalLogitsWarper(sampling.typical_p))
    return chain


def shifted_by_hand(logits: Sequence[float], seen: Sequence[int], start: int, sampling: Sampling) -> list[float]:
    """Bias, penalties and temperature of one row whose answer begins at `start`, an id at a time."""
    scores, bias = [], dict(sampling.logit_bias)
    for token_id, logit in enumerate(logits):
        score = logit + bias.get(token_id, 0)
        if token_id in seen:
            score = score * sampling.repetition_penalty if score < 0 else score / sampling.repetition_penalty
        count = list(seen[start:]).count(token_id)
        score -= count * sampling.frequency_penalty + (sampling.presence_penalty if count else 0)
        scores.append(score / (sampling.temperature or 1))
    return scores
