"""The operations that bounds are known for, by their ATen names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from robusteval.bounds.activations import GELU, GELU_TANH, RELU, SIGMOID, SILU, TANH, Activation, kinked, monotone
from robusteval.bounds.nodes import UnsupportedError
from robusteval.bounds.pooling import MaxPool

aten = torch.ops.aten
Op = Callable[..., Any]
Call = tuple[Op, list[Any], dict[str, Any]]
Rule = Callable[[list[Any], dict[str, Any]], bool]
"""Says, of the arguments of an operation, whether it is affine in those that are free (still `fx.Node`), and keeps each
sample to itself."""


def _free(arg: Any) -> bool:
    return isinstance(arg, fx.Node)


def _always(args: list[Any], kwargs: dict[str, Any]) -> bool:
    return True


def _only(*places: int) -> Rule:
    """Return the rule that nothing but the arguments at ``places`` is free, and nothing is given by name."""
    return lambda args, kwargs: not kwargs and all(not _free(arg) for i, arg in enumerate(args) if i not in places)


def _one_factor(args: list[Any], kwargs: dict[str, Any]) -> bool:
    return not (_free(args[0]) and _free(args[1]))


def _inference(args: list[Any], kwargs: dict[str, Any]) -> bool:
    return _only(0)(args, kwargs) and args[5] is False


def _inside(place: int, default: int | None = None) -> Rule:
    """Return the rule that the dimensions at ``place`` are given and leave out the batch."""

    def rule(args: list[Any], kwargs: dict[str, Any]) -> bool:
        first = args[0][0] if isinstance(args[0], list | tuple) else args[0]
        dims = args[place] if len(args) > place else default
        rank = first.meta["val"].dim() if _free(first) else 0
        listed = dims if isinstance(dims, list | tuple) else [dims]
        return bool(listed) and rank > 0 and all(isinstance(dim, int) and dim % rank != 0 for dim in listed)

    return rule


def _new_inside(args: list[Any], kwargs: dict[str, Any]) -> bool:
    """Say whether the new dimension goes behind the batch."""
    return bool(args[1] % (args[0].meta["val"].dim() + 1) != 0)


def _batch_first(args: list[Any], kwargs: dict[str, Any]) -> bool:
    return bool(args[1][0] == 0)


def _both_inside(args: list[Any], kwargs: dict[str, Any]) -> bool:
    return _inside(1)(args, kwargs) and _inside(2)(args, kwargs)


def _pads_inside(args: list[Any], kwargs: dict[str, Any]) -> bool:
    return bool(len(args[1]) // 2 < args[0].meta["val"].dim())


def _same_rank(args: list[Any], kwargs: dict[str, Any]) -> bool:
    return bool(len(args[1]) == args[0].meta["val"].dim())


def _averages(args: list[Any], kwargs: dict[str, Any]) -> bool:
    divisor = args[6] if len(args) > 6 else kwargs.get("divisor_override")
    return divisor is None or bool(divisor > 0)


LINEAR: Mapping[Any, Rule] = {
    aten.convolution.default: _only(0),
    aten.addmm.default: _only(1),
    aten.mm.default: _only(0),
    aten.linear.default: _only(0),
    aten.native_batch_norm.default: _inference,
    aten.cudnn_batch_norm.default: _inference,
    aten._native_batch_norm_legit_no_training.default: _only(0),
    aten.add.Tensor: _always,
    aten.sub.Tensor: _always,
    aten.rsub.Scalar: _only(0),
    aten.neg.default: _always,
    aten.mul.Tensor: _one_factor,
    aten.mul.Scalar: _only(0),
    aten.div.Tensor: _only(0),
    aten.div.Scalar: _only(0),
    aten.view.default: _always,
    aten._unsafe_view.default: _always,
    aten.reshape.default: _always,
    aten.expand.default: _same_rank,
    aten.permute.default: _batch_first,
    aten.transpose.int: _both_inside,
    aten.squeeze.dim: _inside(1),
    aten.squeeze.dims: _inside(1),
    aten.unsqueeze.default: _new_inside,
    aten.slice.Tensor: _inside(1, 0),
    aten.select.int: _inside(1),
    aten.cat.default: _inside(1, 0),
    aten.slice_scatter.default: _inside(2, 0),
    aten.select_scatter.default: _inside(2),
    aten.mean.dim: _inside(1),
    aten.sum.dim_IntList: _inside(1),
    aten.avg_pool2d.default: _averages,
    aten._adaptive_avg_pool2d.default: _always,
    aten.constant_pad_nd.default: _pads_inside,
}
MIXING = {
    *(aten.convolution.default, aten.addmm.default, aten.mm.default, aten.linear.default),
    *(aten.mean.dim, aten.sum.dim_IntList, aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default),
}
SHAPED = {
    aten.view.default: aten.reshape.default,  # a view cannot be taken of every memory layout, and the layout may differ
    aten._unsafe_view.default: aten.reshape.default,
    aten.reshape.default: aten.reshape.default,
    aten.expand.default: aten.expand.default,
}
"""Operations whose second argument spells out a shape, batch included, and what runs them."""

ALIASES = {
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh.default,
}


def _abs(arg: Any) -> Any:
    return abs(arg) if isinstance(arg, Tensor | int | float) and not isinstance(arg, bool) else arg


def _absolute(*places: int) -> Callable[..., Call]:
    """Return the change of a call that makes its constants at ``places`` absolute."""
    return lambda op, args, kwargs: (op, [_abs(arg) if i in places else arg for i, arg in enumerate(args)], kwargs)


def _added(op: Op, args: list[Any], kwargs: dict[str, Any]) -> Call:
    return aten.add.Tensor, args, {name: _abs(value) for name, value in kwargs.items()}


def _scaled(op: Op, args: list[Any], kwargs: dict[str, Any]) -> Call:
    """Of ``other - alpha z`` keep ``|alpha| z``."""
    return aten.mul.Tensor, [args[0], abs(args[2]) if len(args) > 2 else 1], {}


ABSOLUTE: Mapping[Any, Callable[..., Call]] = {
    aten.convolution.default: _absolute(1),
    aten.addmm.default: _absolute(2),
    aten.mm.default: _absolute(1),
    aten.linear.default: _absolute(1),
    aten.native_batch_norm.default: _absolute(1),
    aten.cudnn_batch_norm.default: _absolute(1),
    aten._native_batch_norm_legit_no_training.default: _absolute(1),
    aten.add.Tensor: _added,
    aten.sub.Tensor: _added,
    aten.rsub.Scalar: _scaled,
    aten.neg.default: lambda op, args, kwargs: (aten.mul.Tensor, [args[0], 1], kwargs),
    aten.mul.Tensor: _absolute(0, 1),
    aten.mul.Scalar: _absolute(1),
    aten.div.Tensor: _absolute(1),
    aten.div.Scalar: _absolute(1),
}
"""What computes ``|W| r`` up to a constant; the other operations have no negative coefficients."""


def _convolution(x: Any, weight: Tensor, bias: Any, *geometry: Any) -> Callable[..., tuple[Tensor, ...]]:
    wanted = [True, False, False]

    def adjoint(a: Tensor, shapes: list[tuple[int, ...]]) -> tuple[Tensor, ...]:
        like = a.new_zeros(()).expand(len(a), *shapes[0])
        return (aten.convolution_backward(a, like, weight, None, *geometry, wanted)[0],)

    return adjoint


def _product(weight: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    return lambda a, shapes: (a @ weight.T,)


ADJOINTS: Mapping[Any, Callable[..., Callable[..., tuple[Tensor, ...]]]] = {
    aten.convolution.default: _convolution,
    aten.addmm.default: lambda bias, x, weight: _product(weight),
    aten.mm.default: lambda x, weight: _product(weight),
    aten.linear.default: lambda x, weight, bias=None: _product(weight.T),
}
"""Adjoints that are cheaper than autograd's, which runs the map forward first."""


def _clamp(low: float | None = None, high: float | None = None) -> Activation:
    least, most = (-math.inf if low is None else low), (math.inf if high is None else high)
    return monotone("clamp", lambda z: torch.minimum(torch.maximum(z, z.new_tensor(least)), z.new_tensor(most)))


def _hardtanh(low: float = -1.0, high: float = 1.0) -> Activation:
    return _clamp(low, high)


def _leaky(slope: float = 0.01) -> Activation:
    if not 0 <= slope <= 1:
        raise UnsupportedError(f"unsupported: leaky ReLU of slope {slope}")
    return kinked("leaky relu", slope)


def _gelu(approximate: str = "none") -> Activation:
    return GELU if approximate == "none" else GELU_TANH


ACTIVATIONS: Mapping[Any, Callable[..., Activation]] = {
    aten.relu.default: lambda: RELU,
    aten.leaky_relu.default: _leaky,
    aten.sigmoid.default: lambda: SIGMOID,
    aten.tanh.default: lambda: TANH,
    aten.silu.default: lambda: SILU,
    aten.gelu.default: _gelu,
    aten.hardtanh.default: _hardtanh,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
}


def max_pool(
    size: tuple[int, ...],
    out: tuple[int, ...],
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    *_: Any,
) -> MaxPool:
    """Return the pooling that maps (C, H, W) = ``size`` to ``out``, of ATen's arguments."""
    if len(size) != 3:
        raise UnsupportedError("unsupported: max pooling of images without channels")
    pairs = (_pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation))
    return MaxPool.over((size[1], size[2]), (out[1], out[2]), *pairs)


def _pair(value: Any) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else tuple(value)
    return (both[0], both[-1])


POOLS = {aten.max_pool2d_with_indices.default, aten.max_pool2d.default}
