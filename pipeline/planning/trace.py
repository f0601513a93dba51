"""One training pass of the real model on fake tensors: what is alive when, what is kept for backward, what is computed.

Fake tensors have shapes, types and storages but no values, so that HorNet-L at 384 px takes seconds on one core and no
memory. They stand on a fake CPU: torch's backward asks for a real GPU. What autocast keeps there differs from what it
keeps on a GPU by less than a hundredth (tests/pipeline/planning/test_trace.py). Drop path is off, as in the worst step.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

from pipeline.config.run import RunConfig
from pipeline.ops import kernels
from pipeline.planning.subject import Policy, Subject, subject_of

_MOVES_NOTHING = (
    *(torch.ops.aten._unsafe_view, torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty),
    *(torch.ops.aten.empty_strided, torch.ops.aten.new_empty_strided),
)
_CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)


class Moment(NamedTuple):
    """A stretch of backward that ends with the gradient of one parameter of `elements`.

    `peak`: most bytes alive in it, activations and what is computed, that gradient too, earlier ones not; `after`:
    those at its end, without it.
    """

    name: str
    elements: int
    peak: int
    after: int


class Traced(NamedTuple):
    """A pass of `batch` images. Bytes; weights and the images are not in them.

    saved: of storages that autograd keeps from forward to backward; forward_peak: most alive in forward; backward: its
    moments; dense_flops, depthwise_flops: of products and of depthwise convolutions; moved: read and written by
    operations, each by itself.
    """

    batch: int
    saved: int
    forward_peak: int
    backward: tuple[Moment, ...]
    dense_flops: int
    depthwise_flops: int
    moved: int


def trace(config: RunConfig, num_classes: int, policy: Policy, batch: int, bf16: bool) -> Traced:
    """What a pass of `batch` of the largest images holds and does, under `policy`, in bf16 autocast or fp32."""
    subject = subject_of(config, num_classes)
    with kernels.enabled(False), FakeTensorMode():
        return _trace_pass(subject, fake_net(subject, policy, "cpu"), batch, bf16)


def at_batch(small: Traced, large: Traced, batch: int) -> Traced:
    """The pass at another batch: every figure is a line in it, as the shapes are."""

    def line(one: int, two: int) -> int:
        return max(0, round(one + (two - one) * (batch - small.batch) / (large.batch - small.batch)))

    moments = tuple(
        one._replace(peak=line(one.peak, two.peak), after=line(one.after, two.after))
        for one, two in zip(small.backward, large.backward, strict=True)
    )
    figures = {
        name: line(getattr(small, name), getattr(large, name))
        for name in ("saved", "forward_peak", "dense_flops", "depthwise_flops", "moved")
    }
    return Traced(batch=batch, backward=moments, **figures)


class _Live(TorchDispatchMode):
    """Bytes of the storages that operations made and that are alive, their peak, FLOPs and bytes moved so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.moved = self.dense_flops = self.depthwise_flops = 0
        self._bytes: dict[int, int] = {}  # by address of the storage's implementation, unique while it lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim":  # a fake tensor is asked for its device: more than half of all calls
            return out
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self._count(func, args, kwargs, out)
        if not func.is_view and func._overloadpacket not in _MOVES_NOTHING:
            self.moved += sum(tensor.nbytes for tensor in (*given, *made))
        own = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage._cdata in self._bytes or storage._cdata in own:
                continue
            self._bytes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self._free, storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        packet = func._overloadpacket
        if packet not in flop_registry:
            return
        depthwise = False
        if packet in _CONVOLUTIONS:
            groups = args[8] if packet is torch.ops.aten.convolution else args[9]
            depthwise = groups > 1
        if packet is torch.ops.aten.convolution_backward:  # torch's own count takes grouped ones for dense
            flops = conv_flop_count(args[1].shape, args[2].shape, args[0].shape, transposed=args[7]) * sum(args[10][:2])
        else:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
        if depthwise:
            self.depthwise_flops += flops
        else:
            self.dense_flops += flops

    def _free(self, key: int) -> None:
        self.now -= self._bytes.pop(key)


def fake_net(subject: Subject, policy: Policy, device: str) -> nn.Module:
    """The net with fake tensors on `device` as its weights."""
    with torch.device("meta"):  # where initial values, which a fake tensor cannot hold, are passed over
        net = subject.net(policy)
    for module in net.modules():  # what `to_empty` does, which fake tensors refuse
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
    return net.train()


def _trace_pass(subject: Subject, net: nn.Module, batch: int, bf16: bool) -> Traced:
    loss, targets = subject.loss(), subject.targets(batch)
    images = torch.empty(batch, 3, subject.side, subject.side)
    own = {t.untyped_storage()._cdata for t in (images, targets, *net.parameters(), *net.buffers())}
    kept = Kept(own)
    moments: list[Moment] = []
    with _Live() as live:
        for name, parameter in net.named_parameters():
            parameter.register_post_accumulate_grad_hook(_ended(name, live, moments))
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            with autocast("cpu", bf16):
                outputs = net(images)
            value = loss(outputs, targets)
            del outputs
        saved, forward_peak = kept.bytes, live.peak
        kept.storages.clear()
        live.peak = live.now
        value.backward()
    return Traced(batch, saved, forward_peak, tuple(moments), live.dense_flops, live.depthwise_flops, live.moved)


def _ended(name: str, live: _Live, moments: list[Moment]) -> Any:
    def ended(parameter: Tensor) -> None:
        peak, parameter.grad = live.peak, None
        moments.append(Moment(name, parameter.numel(), peak, live.now))
        live.peak = live.now

    return ended


class Kept:
    """What autograd saves, each storage once and whole; what is in `own` aside."""

    def __init__(self, own: set[int]) -> None:
        self.own = own
        self.storages: dict[int, Any] = {}  # the storages too: an address that is freed would come again

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.storages.setdefault(storage._cdata, storage)
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@contextmanager
def autocast(device: str, bf16: bool) -> Iterator[None]:
    """`torch.autocast`, also for a GPU that exists in name only."""
    torch.set_autocast_enabled(device, bf16)
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, False)
