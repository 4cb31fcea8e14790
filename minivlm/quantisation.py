"""Weights in 8 or 4 bits: the decoder is quantised layer by layer while it is loaded, and what that does to its logits
is measured on the way.

Two streams of hidden states of one text go through the decoder: one through each layer as it was stored, one through
the same layer as it is kept. So the change is that of this model by this backend, activations in 8 bits included where
the backend has them, and there is never more of the original weights in memory than one layer.

It knows nothing of files. The vision tower, the projector, the embeddings and norms stay as they are: the tower runs
once an answer, where arithmetic and not reading takes the time. The head is quantised to int8 in both formats, as one
wrong bit of it is one wrong bit of an answer; a head tied to the embeddings stays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from minivlm.decoder.mistral import MistralConfig, MistralDecoder
from minivlm.errors import InputError
from minivlm.kernels.quantise import GROUP
from minivlm.ops.quantised import FORMATS, QuantisedLinear, quantise
from minivlm.ops.rows import Rows
from minivlm.vlm import VLM

STORED = "stored"  # the name of weights that are left as they are
MOST_IDS = 128
TEXT = """The picture shows a narrow street in the rain. Two people with a red umbrella walk past a bakery, whose sign \
reads "Since 1912". Behind them stands a bicycle; on the left, three small tables are still set for lunch. \
How many people are there, and what does the sign say? There are two people, and the sign says "Since 1912"."""


@dataclass(frozen=True)
class LogitChange:
    """What quantising did to the logits of one text.

    Attributes:
        form: of the weights, as asked for.
        before, after: bytes of the quantised layers, as they were and as they are.
        positions: of the text that were compared.
        relative: root mean square of the change over the standard deviation of the logits of a position.
        divergence: Kullback-Leibler divergence of the new distribution from the old, mean over positions, in nats.
        same: positions whose likeliest id is still the likeliest.
    """

    form: str
    before: int
    after: int
    positions: int
    relative: float
    divergence: float
    same: int

    def line(self) -> str:
        """For a person."""
        return (
            f"weights in {self.form}: {self.after / 1e6:.1f} MB instead of {self.before / 1e6:.1f}; logits of a text "
            f"changed by {self.relative:.1%} of their deviation, KL divergence {self.divergence:.2g}, the likeliest id "
            f"is the same at {self.same} of {self.positions} positions"
        )


def check(form: str, config: MistralConfig) -> None:
    """Raises InputError for a format that is not known, or that a decoder of this configuration cannot have."""
    if form not in (STORED, *FORMATS):
        raise InputError(f"weights {form!r}, expected {STORED}, {' or '.join(FORMATS)}")
    inputs = {
        "hidden_size": config.hidden_size,
        "num_attention_heads * head_dim": config.num_attention_heads * config.head_dim,
        "intermediate_size": config.intermediate_size,
    }
    for name, number in inputs.items():
        if form == "int4" and number % GROUP:
            raise InputError(f"weights int4: {name} = {number}, expected a multiple of {GROUP}")


def quantise_while_filling(
    model: VLM, fill: Callable[[nn.Module, str], None], form: str, ids: Sequence[int]
) -> LogitChange:
    """Give a model on `meta` its weights, those of its decoder in one of FORMATS, prepared for its backend.

    fill: gives a module the stored weights of the names that begin with a prefix. ids: the text to measure with.
    Raises InputError for a model that cannot be quantised so.
    """
    decoder = model.language_model
    sizes = Sizes()
    layers, decoder.layers = decoder.layers, nn.ModuleList()  # they are filled one at a time, when the rest is there
    fill(model, "")
    model.requires_grad_(False)
    run = _runner(decoder, len(ids))
    old = new = decoder.embed_tokens(torch.tensor(ids, device=decoder.embed_tokens.weight.device))  # [S, D]
    for number, layer in enumerate(layers):
        fill(layer, f"language_model.layers.{number}.")
        layer.requires_grad_(False)
        old = run(layer, old)
        quantise_linears(layer, form, sizes)
        decoder.backend.prepare(layer)
        new = run(layer, new)
    decoder.layers = layers
    logits = decoder.logits(decoder.norm(old)).float()  # [S, V]
    quantise_head(decoder, sizes)
    decoder.backend.prepare(model)
    return _change(logits, decoder.logits(decoder.norm(new)).float(), form, sizes)


@dataclass
class Sizes:
    """Bytes of the layers that were quantised, before and after."""

    before: int = 0
    after: int = 0


def quantise_linears(layer: nn.Module, form: str, sizes: Sizes) -> None:
    """Every linear layer of a decoder's layer."""
    for module in (layer.self_attn, layer.mlp):
        for name, linear in list(module.named_children()):
            setattr(module, name, _counted(linear, form, sizes))


def quantise_head(decoder: MistralDecoder, sizes: Sizes) -> None:
    """The head to int8, unless it is the embeddings."""
    if not decoder.config.tie_word_embeddings:
        decoder.lm_head = _counted(decoder.lm_head, "int8", sizes)


def _counted(linear: nn.Linear, form: str, sizes: Sizes) -> QuantisedLinear:
    quantised = quantise(linear, form)
    sizes.before += linear.weight.nbytes
    sizes.after += quantised.weight.nbytes + quantised.scale.nbytes
    return quantised


def _runner(decoder: MistralDecoder, positions: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """A function (layer, hidden states) -> hidden states of one text of that many ids."""
    config, weight, backend = decoder.config, decoder.embed_tokens.weight, decoder.backend
    rows = Rows.causal([positions])
    rope = backend.rope(rows, config.head_dim, config.rope_theta, weight.dtype, weight.device)
    seen = backend.sight(rows, config.sliding_window, weight.device)
    return lambda layer, x: layer(x, rope, rows, seen, None)


def _change(old: Tensor, new: Tensor, form: str, sizes: Sizes) -> LogitChange:
    """Compare logits [S, V]; a constant added to all of a position means nothing and is taken away first."""
    difference = new - old
    difference -= difference.mean(-1, keepdim=True)
    before, after = old.log_softmax(-1), new.log_softmax(-1)
    return LogitChange(
        form=form,
        before=sizes.before,
        after=sizes.after,
        positions=len(old),
        relative=(difference.square().mean() / old.var(-1, correction=0).mean()).sqrt().item(),
        divergence=kl_div(after, before, reduction="batchmean", log_target=True).item(),
        same=int((old.argmax(-1) == new.argmax(-1)).sum()),
    )
