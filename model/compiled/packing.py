"""Convolutions whose weights lie as oneDNN reads them, so that no call has to bring them into that order first.

For one row that order costs more than the convolution itself. Inductor packs weights only where the number of rows is
fixed and the weights are part of the program; here they are handed in, and packed for whatever is called.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx.node import Argument

_CONV = torch.ops.aten.conv2d.default
_DEFAULTS: list[Argument] = [None, [1, 1], [0, 0], [1, 1], 1]  # of bias, stride, padding, dilation and groups


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """In bfloat16, on a CPU for which oneDNN has kernels of it."""
    has_onednn = torch.backends.mkldnn.is_available()
    return (
        has_onednn and (device.type, dtype) == ("cpu", torch.bfloat16) and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def take_packed_weights(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with each convolution as an operator that takes its weights packed, and not packed as well."""
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
    """Packs the weights of a module's convolutions; how they are to lie depends on a call's rows and threads."""

    def __init__(self, module: nn.Module, call: Callable[[], object]) -> None:
        """`call` runs the module once, so that each convolution is seen with its input."""
        named = module.named_modules()
        self._convolutions = {name: part for name, part in named if isinstance(part, nn.Conv2d)}
        self._sizes: dict[nn.Module, torch.Size] = {}  # (C, H, W) of the inputs
        self._packed: dict[tuple[str, bytes], Tensor] = {}  # by what is packed, and how it lies
        hooks = [conv.register_forward_pre_hook(self._see) for conv in self._convolutions.values()]
        try:
            call()
        finally:
            for hook in hooks:
                hook.remove()

    @torch.inference_mode()
    def weights_for(self, rows: int) -> dict[str, Tensor]:
        """By their names in the module's state, for calls of so many rows by the threads that there are now.

        They are opaque tensors of the same shapes.
        """
        return {f"{name}.weight": self._pack(name, conv, rows) for name, conv in self._convolutions.items()}

    def _pack(self, name: str, conv: nn.Conv2d, rows: int) -> Tensor:
        how = conv.padding, conv.stride, conv.dilation, conv.groups
        packed = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *how, [rows, *self._sizes[conv]])
        layout = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy())
        return self._packed.setdefault((name, layout), packed)

    def _see(self, conv: nn.Module, inputs: tuple[Tensor]) -> None:
        self._sizes[conv] = inputs[0].shape[1:]
