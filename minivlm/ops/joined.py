"""Linear layers that read the same input, as one: their weights one above the other, so that one product does for all.

A backend that wants this makes groups of a loaded model's layers, module by module. Each original goes at once, so of
no more than one group are there ever two copies; and where they were loaded end to end, which `places` sees to, there
is no copy. Such a model is for inference where it is: it is not moved, filled again or trained.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from minivlm.errors import InputError
from minivlm.ops.quantised import QuantisedLinear, widened

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers of one module that read the same input
LINEAR = (nn.Linear, QuantisedLinear)


class Group(nn.Module):
    """Layers of one input.

    weight: [N_1 + N_2 + .., K], or as ops/quantised.py keeps it, with its `scale`, which is None otherwise; bias:
    [N_1 + N_2 + ..] or None. They have no gradients.
    """

    packed = False  # whether the weight lies in an order that only the product reads

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.sizes, self.inputs = [layer.out_features for layer in layers], layers[0].in_features
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self.bias = _joined_parameter(biases) if biases else None
        if isinstance(layers[0], QuantisedLinear):
            self.register_buffer("weight", _joined([layer.weight for layer in layers]), persistent=False)
            self.register_buffer("scale", _joined([layer.scale for layer in layers]), persistent=False)
        else:
            self.weight, self.scale = _joined_parameter([layer.weight for layer in layers]), None

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N_1 + N_2 + ..]"""
        weight = self.weight if self.scale is None else widened(self.weight, self.scale, x.dtype)
        return linear(x, weight, self.bias)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """The layers' results one by one."""
        return self(x).split(self.sizes, dim=-1)

    @property
    def kept_bytes(self) -> int:
        """Of its weight, as it is kept."""
        return self.weight.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def whole(self) -> Tensor:
        """The weight in the usual order, bit for bit what was loaded; not of quantised ones."""
        return self.weight

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        """Nothing: the layers save their own weights, under the checkpoint's names."""


class GroupedLinear(nn.Module):
    """What stands in the place of an nn.Linear: layer number `index` of a group."""

    def __init__(self, group: Group, index: int):
        super().__init__()
        self.group, self.index = group, index
        self.out_features, self.in_features = group.sizes[index], group.inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.group(x)
        return out if len(self.group.sizes) == 1 else out.split(self.group.sizes, dim=-1)[self.index]

    @property
    def weight(self) -> Tensor:
        """[N, K] in the usual order, bit for bit what was loaded; a copy where it was packed or joined.

        Raises InputError where it was quantised.
        """
        if self.group.scale is not None:
            raise InputError("a layer's weight was quantised while loading, expected weights as stored to read it")
        weight = self.group.whole()
        if len(self.group.sizes) == 1:
            return weight
        return weight.split(self.group.sizes)[self.index].clone(memory_format=torch.contiguous_format)

    @property
    def bias(self) -> Tensor | None:
        """[N]"""
        return None if self.group.bias is None else self.group.bias.split(self.group.sizes)[self.index].clone()

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        if self.group.scale is not None:
            return  # as QuantisedLinear, which has no parameters either
        destination[prefix + "weight"] = self.weight.detach().contiguous()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias


def group_of(layers: Sequence[nn.Module]) -> Group | None:
    """The group that these layers are, all of it and in its order; None if they are layers of their own."""
    group = layers[0].group if isinstance(layers[0], GroupedLinear) else None
    return group if group is not None and len(group.sizes) == len(layers) else None


def join(model: nn.Module, make: Callable[[list[nn.Module]], Group], alone: bool) -> None:
    """Put what `make` makes of the layers of one input in their place; of layers that are `alone` too, if asked."""
    model.requires_grad_(False)
    # Without the linear layers themselves: whoever holds them holds their weights, until the last is joined.
    for module in [module for module in model.modules() if not isinstance(module, LINEAR)]:
        layers = {name: child for name, child in module.named_children() if isinstance(child, LINEAR)}
        groups = [names for names in GROUPS if set(names) <= set(layers)]
        joined = {name for names in groups for name in names}
        others = [(name,) for name in layers if alone and name not in joined]
        for names in (*groups, *others):
            group = make([layers.pop(name) for name in names])
            for index, name in enumerate(names):
                setattr(module, name, GroupedLinear(group, index))


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a model by its name, once, in the usual order; joined ones are taken apart one at a time."""
    seen = set()
    for prefix, module in model.named_modules():
        if isinstance(module, GroupedLinear):
            values = {"weight": module.weight} | ({} if module.bias is None else {"bias": module.bias})
        elif isinstance(module, Group):
            continue
        else:
            values = dict(module.named_parameters(recurse=False))
        for name, tensor in values.items():
            if id(tensor) not in seen:  # a tied head is the embedding
                yield f"{prefix}.{name}".removeprefix("."), tensor
        seen |= {id(tensor) for tensor in values.values() if isinstance(tensor, nn.Parameter)}


def quantised(model: nn.Module) -> bool:
    """Whether any of a model's layers has its weights in 8 or 4 bits."""
    groups = (module for module in model.modules() if isinstance(module, (QuantisedLinear, Group)))
    return any(group.scale is not None for group in groups)


def kept_bits(model: nn.Module) -> float | None:
    """How many bits a weight takes in a model's groups and quantised layers, on average; None if it has neither."""
    numbers = kept = 0
    for module in model.modules():
        if isinstance(module, Group):
            numbers += module.inputs * sum(module.sizes)
            kept += module.kept_bytes
        elif isinstance(module, QuantisedLinear):
            numbers += module.in_features * module.out_features
            kept += module.weight.nbytes + module.scale.nbytes
    return 8 * kept / numbers if numbers else None


def places(shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Empty tensors for the parameters of these names that belong to a group, its members end to end."""
    found = {}
    for name in shapes:
        for group in GROUPS:
            prefix, first, leaf = name.rpartition(f"{group[0]}.")
            members = [f"{prefix}{member}.{leaf}" for member in group]
            if first and all(member in shapes for member in members):
                sizes = [shapes[member][0] for member in members]
                whole = torch.empty(sum(sizes), *shapes[name][1:], dtype=dtype, device=device)
                found |= zip(members, whole.split(sizes), strict=True)
    return found


def _joined_parameter(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    """One alone stays the parameter that it is."""
    if len(parameters) == 1:
        return parameters[0]
    return nn.Parameter(_joined([parameter.detach() for parameter in parameters]), requires_grad=False)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """[V_1 + V_2 + .., D] of tensors [V_i, D]: the memory that they are parts of, or else a copy."""
    whole = _whole(tensors)
    return torch.cat(tensors) if whole is None else whole


def _whole(tensors: Sequence[Tensor]) -> Tensor | None:
    """The one tensor that these are, end to end; None if they are not."""
    first = tensors[0]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for tensor in tensors:
        if tensor.untyped_storage().data_ptr() != storage or tensor.data_ptr() != end or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())
