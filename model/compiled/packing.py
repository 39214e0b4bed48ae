"""Packs convolution weights into the memory layout that oneDNN uses, once instead of in every call.

oneDNN, the library behind torch's bfloat16 convolutions on a CPU, reorders plain weights in each call. For one row this
takes longer than the convolution. Inductor can pack weights at compile time, but only if the number of rows is fixed
and the weights are part of the program. Here neither is true: the program takes the weights as inputs, and they are
packed for the batch sizes that occur.

`take_packed_weights` changes the exported program so that it accepts packed weights. `Packer` packs them. Packing
changes the order of the weights only, not their values or the results. Devices without support (`can_pack`) use plain
weights.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx.node import Argument

_CONV = torch.ops.aten.conv2d.default
_DEFAULTS: list[Argument] = [None, [1, 1], [0, 0], [1, 1], 1]  # default bias, stride, padding, dilation and groups


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns True for bfloat16 on a CPU for which oneDNN has bfloat16 kernels."""
    has_onednn = torch.backends.mkldnn.is_available()
    return (
        has_onednn and (device.type, dtype) == ("cpu", torch.bfloat16) and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def take_packed_weights(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Replaces each convolution by the oneDNN operator, which accepts packed and plain weights. Returns `exported`."""
    graph = exported.graph
    for node in [node for node in graph.nodes if node.target is _CONV]:
        x, weight, *rest = list(node.args)
        bias, stride, padding, dilation, groups = rest + _DEFAULTS[len(rest) :]
        arguments: tuple[Argument, ...] = (x, weight, bias, padding, stride, dilation, groups, "none", [], "")
        with graph.inserting_before(node):
            packed = graph.call_function(torch.ops.mkldnn._convolution_pointwise.default, arguments)
        packed.meta.update(node.meta)
        node.replace_all_uses_with(packed)
        graph.erase_node(node)
    exported.graph_module.recompile()
    return exported


class Packer:
    """Packs the weights of all convolutions of a module. The best layout depends on the numbers of rows and threads."""

    def __init__(self, module: nn.Module, call: Callable[[], object]) -> None:
        """`call` must run the module once. Hooks then record the input size of each convolution."""
        named = module.named_modules()
        self._convolutions = {name: part for name, part in named if isinstance(part, nn.Conv2d)}
        self._sizes: dict[nn.Module, torch.Size] = {}  # (C, H, W) of the inputs
        self._packed: dict[tuple[str, bytes], Tensor] = {}  # (convolution, layout) -> packed weights
        hooks = [conv.register_forward_pre_hook(self._record_size) for conv in self._convolutions.values()]
        try:
            call()
        finally:
            for hook in hooks:
                hook.remove()

    @torch.inference_mode()
    def weights_for(self, rows: int) -> dict[str, Tensor]:
        """Returns packed weights for calls with this number of rows and the current number of threads.

        The keys are the names in the state dict of the module. The values are opaque oneDNN tensors of the same shapes.
        Tensors with the same layout are shared between the results of several calls.
        """
        return {f"{name}.weight": self._pack(name, conv, rows) for name, conv in self._convolutions.items()}

    def _pack(self, name: str, conv: nn.Conv2d, rows: int) -> Tensor:
        options = conv.padding, conv.stride, conv.dilation, conv.groups
        packed = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *options, [rows, *self._sizes[conv]])
        layout = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy())
        return self._packed.setdefault((name, layout), packed)

    def _record_size(self, conv: nn.Module, inputs: tuple[Tensor]) -> None:
        self._sizes[conv] = inputs[0].shape[1:]
