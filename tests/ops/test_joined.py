"""Layers of one input as one: when the weights are copied, what a part is, and which layers are a group."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from minivlm.errors import InputError
from minivlm.kernels.quantise import quantise_int8
from minivlm.ops import joined
from minivlm.ops.quantised import QuantisedLinear


def block(bias: bool, end_to_end: bool) -> tuple[nn.Module, list[torch.Tensor]]:
    """A module with q, k, v of 8, 4, 4 outputs and another layer; and the four weights."""
    made = nn.Module()
    names = {"q_proj": 8, "k_proj": 4, "v_proj": 4, "o_proj": 6}
    weights = list(torch.randn(22, 6, generator=torch.Generator().manual_seed(0)).split(list(names.values())))
    for (name, size), weight in zip(names.items(), weights, strict=True):
        setattr(made, name, nn.Linear(6, size, bias))
        getattr(made, name).weight = nn.Parameter(weight if end_to_end else weight.clone())
    return made, weights


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("end_to_end", (False, True))
def test_a_group_computes_what_its_layers_do(bias, end_to_end):
    made, weights = block(bias, end_to_end)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    layers = [made.q_proj, made.k_proj, made.v_proj]
    expected = [layer(x) for layer in layers]
    before = made.state_dict()
    joined.join(made, joined.Group, alone=False)
    parts = [made.q_proj, made.k_proj, made.v_proj]
    group = joined.group_of(parts)
    assert (group.weight.data_ptr() == weights[0].data_ptr()) is end_to_end
    assert type(made.o_proj) is nn.Linear and joined.group_of([made.o_proj]) is None
    assert joined.group_of(parts[:2]) is None
    for found in (group.parts(x), [part(x) for part in parts]):
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, atol=1e-6)
    after = made.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert dict(joined.weights(made)).keys() == before.keys()


def test_layers_alone_are_groups_of_one_and_keep_their_weight():
    made, _ = block(False, True)
    weight = made.o_proj.weight
    joined.join(made, joined.Group, alone=True)
    assert made.o_proj.group.sizes == [6] and made.o_proj.weight is weight


def test_weights_that_lie_side_by_side_in_another_order_are_copied():
    whole = torch.arange(12.0).view(6, 2)
    first, second = whole.split([2, 4])
    assert torch.equal(joined._joined([second, first]), torch.cat([second, first]))
    gap = [whole[:2], whole[3:]]
    assert torch.equal(joined._joined(gap), torch.cat(gap))
    columns = [whole[:, :1], whole[:, 1:]]
    assert torch.equal(joined._joined(columns), torch.cat(columns))


def test_quantised_layers_join_their_scales():
    made, layers = nn.Module(), []
    for name in ("gate_proj", "up_proj"):
        layers.append(QuantisedLinear(*quantise_int8(torch.randn(3, 4))))
        setattr(made, name, layers[-1])
    x = torch.randn(2, 4)
    assert joined.quantised(made)
    joined.join(made, joined.Group, alone=False)
    assert joined.quantised(made)
    for found, layer in zip(made.gate_proj.group.parts(x), layers, strict=True):
        assert torch.allclose(found, linear(x, layer.weight.float() * layer.scale[:, None]), atol=1e-6)
    assert made.state_dict().keys() == set()
    with pytest.raises(InputError, match="weight was quantised while loading"):
        _ = made.up_proj.weight
    moved = made.to(torch.float64)
    assert moved.gate_proj.group.weight.dtype == torch.int8
