"""The values of stored tensors into the parameters of a model that was built on `meta`, each read and converted alone.

It knows nothing of names: `checkpoint.account` says which stored tensor a parameter has.
"""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from minivlm.errors import InputError
from minivlm.ops.joined import places
from minivlm.shards import StoredTensor, read_tensors

STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIECE = 2**18  # numbers converted at a time
HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.embed_tokens.weight"


class Filling:
    """Fills a model, or one of its modules at a time, while a bar on stderr shows how far it is.

    sources: the stored tensor of every parameter. title: of the bar, None for no bar.
    """

    def __init__(
        self, sources: Mapping[str, StoredTensor], device: torch.device, dtype: torch.dtype, title: str | None
    ):
        self.sources, self.device, self.dtype = sources, device, dtype
        total = sum(map(nbytes, {tensor.name: tensor for tensor in sources.values()}.values()))
        hidden = None if title is not None else True  # tqdm shows nothing where stderr is no terminal
        self.bar = tqdm(desc=title, total=total, unit="B", unit_scale=True, delay=0.5, disable=hidden)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def __call__(self, module: nn.Module, prefix: str = "") -> None:
        """Give a module of the model the values of its parameters, whose names there begin with `prefix`.

        Tied parameters stay one. Raises InputError for NaN, infinity, and tied tensors that differ.
        """
        names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        state = self._converted({name: self.sources[prefix + name] for name in names})
        tied = HEAD in names and module.get_parameter(HEAD) is module.get_parameter(EMBEDDING)
        if tied:
            twins = [state[name] for name in (EMBEDDING, HEAD) if name in state]
            if not torch.equal(twins[0], twins[-1]):
                pair = f"{self.sources[EMBEDDING].name} and {self.sources[HEAD].name}"
                raise InputError(f"{self.sources[HEAD].file}: {pair} differ, but tie_word_embeddings is true")
            state[EMBEDDING] = state[HEAD] = twins[0]
        module.load_state_dict(state, assign=True)
        if tied:
            module.language_model.lm_head.weight = module.language_model.embed_tokens.weight

    def _converted(self, sources: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
        """The values of these parameters, one stored tensor at a time; those of one product end to end."""
        parameters = {tensor.name: name for name, tensor in sources.items()}
        tensors = {tensor.name: tensor for tensor in sources.values()}.values()
        # What is right as it is stored needs no place of its own.
        changed = {name: tensor.shape for name, tensor in sources.items() if self._changes(tensor)}
        state, place = {}, places(changed, self.dtype, self.device)
        for tensor, read in read_tensors(tensors):
            values = self._cast(read, place.pop(parameters[tensor.name], None))
            if not _is_finite(values):
                fault = f"values too large for {self.dtype}" if _is_finite(read) else "NaN or infinity"
                raise InputError(f"{tensor.file}: {tensor.name} holds {fault}")
            state[parameters[tensor.name]] = values
            self.bar.update(nbytes(tensor))
        return state

    def _changes(self, tensor: StoredTensor) -> bool:
        return self.device.type != "cpu" or STORED_DTYPES[tensor.dtype] != self.dtype

    def _cast(self, read: Tensor, place: Tensor | None) -> Tensor:
        """The values in the model's type on its device, in their place if they have one.

        A CPU goes between the 16-bit types twice as fast through float32, piece by piece. A GPU gets the values as
        stored, which has half the bytes of float32.
        """
        if self.device.type != "cpu" or {read.dtype, self.dtype} != {torch.float16, torch.bfloat16}:
            values = read.to(self.device)
            return values.to(self.dtype) if place is None else place.copy_(values)
        result = torch.empty_like(read, dtype=self.dtype) if place is None else place
        for piece, part in zip(read.flatten().split(PIECE), result.view(-1).split(PIECE), strict=True):
            part.copy_(piece.float())
        return result


def nbytes(tensor: StoredTensor) -> int:
    """Of the stored values."""
    return torch.Size(tensor.shape).numel() * STORED_DTYPES[tensor.dtype].itemsize


def _is_finite(values: Tensor) -> bool:
    """Whether every number is finite, without a temporary as large as the tensor.

    A sum is finite only if all its terms are, and is the quickest to take; it may overflow where all terms are finite
    (70000 ones in float16), so a bad sum is only a suspicion. NaN goes through to the extremes as well.
    """
    return bool(values.sum().isfinite()) or bool(torch.stack(values.aminmax()).isfinite().all())


class Unfilled(TorchFunctionMode):
    """Makes filling a tensor with normal numbers do nothing: on `meta` PyTorch would import its compiler, a second's
    work, to change no number."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)
