"""What transformers does to scores before it draws, for the settings of a row: the oracle of the samplers."""

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
    return chain
