"""Generates Triton code for a GPU on a machine without a GPU, and compiles or interprets it.

This module runs as a separate process, because it makes torch behave as if there were a GPU:
  python -m tests.model.compiled.triton_code step CHECKPOINT SM...    compiles the kernels of the whole reverse step
  python -m tests.model.compiled.triton_code noise                    runs the noise kernels (needs TRITON_INTERPRET=1)
It prints one JSON object. Inductor traces with fake tensors, which have no data, so CUDA is not needed.
"""

import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model import checkpoint, noise
from model.compiled.compiler import FlatStep
from model.precision import CallRows
from model.sampler import PLAN_COLUMNS
from model.step import ReverseStep, State
from tests.model.gpu_operations import gpu_operations

GPU = torch.device("cuda:0")
ROWS, EVALUATIONS, SLOTS, PLANS, NOISE_STEPS = 8, 12, 256, 512, 101
# Block sizes that the heuristics of Inductor could choose. Triton compiles any power of two.
BLOCKS = {"XBLOCK": 64, "YBLOCK": 16, "R0_BLOCK": 256}


class H100:
    """The GPU properties that torch reads."""

    name, major, minor, gcnArchName = "NVIDIA H100 80GB HBM3", 9, 0, ""
    total_memory, L2_cache_size = 80 << 30, 50 << 20
    multi_processor_count, warp_size, max_threads_per_multi_processor, max_threads_per_block = 132, 32, 2048, 1024
    regs_per_multiprocessor = 65536
    shared_memory_per_block, shared_memory_per_block_optin, shared_memory_per_multiprocessor = 49152, 232448, 233472
    clock_rate, memory_clock_rate, memory_bus_width = 1980000, 2619000, 5120


class Driver:
    """The part of a Triton driver that code generation uses."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def is_active(self) -> bool:
        return True


def pretend_gpu() -> None:
    """Makes torch and Triton behave as if this machine had one H100."""
    torch.version.cuda = "13.0"
    facts: dict[str, Any] = {
        "get_device_properties": H100,
        "get_device_capability": (9, 0),
        "current_device": 0,
        "device_count": 1,
        "is_bf16_supported": True,
    }
    for name, value in facts.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    for name, value in {**facts, "get_compute_capability": 90, "is_available": True}.items():
        setattr(CudaInterface, name, staticmethod(lambda *_, value=value, **__: value))
    CudaInterface.Worker.get_device_properties = staticmethod(lambda *_, **__: H100)
    CudaInterface.Worker.current_device = staticmethod(lambda: 0)
    drivers = sys.modules["triton.runtime.driver"].driver
    drivers._active = drivers._default = Driver()
    torch._C._conv_determine_backend_memory_format = lambda *_: torch.channels_last  # cuDNN chooses the same format


def generate(function: Callable[..., Any], inputs: Sequence[Tensor]) -> str:
    """Returns the source of the Python module with Triton kernels that Inductor generates for the function.

    The CPU build of torch can trace fake CPU tensors only. So the function is traced on the CPU, and then the graph is
    moved to the GPU.
    """
    with FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad():
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in inputs]
        graph = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="real")(*fakes)
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": GPU}
        if node.target is torch.ops.prims.device_put.default:
            node.args = (node.args[0], GPU, *node.args[2:])
        node.meta.pop("val", None)
    graph.recompile()
    assert not [node for node in graph.graph.nodes if node.op == "get_attr"], "constants are not moved to the GPU"
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with mode:
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU) for x in inputs]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*fakes)
    with mock.patch.object(torch.cuda, "is_available", return_value=True), torch.no_grad():
        lowering = GraphLowering(graph, shape_env=mode.shape_env, example_inputs=fakes, is_inference=True)
        with V.set_graph_handler(lowering), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            lowering.run(*fakes)
            wrapper, _ = lowering.codegen()
    return str(wrapper.value)


def kernels(code: str) -> Iterator[tuple[str, str]]:
    """Yields the name and the source of each Triton kernel in a generated module."""
    for found in re.finditer(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", code, re.DOTALL):
        yield found.group(1), found.group(2)


def count_launches(code: str) -> int:
    """Returns the number of calls in a generated module that launch a kernel, such as a convolution."""
    body = code[code.index("class Runner:") : code.index("runner = Runner(")]
    return len(
        re.findall(r"^ +(?:\w+ = )?(?:triton_\w+\.run|extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", body, re.MULTILINE)
    )


def signature_of(source: str) -> dict[str, str]:
    """Returns the arguments of a kernel and their types. Arguments of type `constexpr` are block sizes."""
    found = re.search(r"'signature': \{(.*?)\}", source)
    assert found
    return dict(re.findall(r"'(\w+)': '([*\w]+)'", found.group(1)))


def kernel_of(name: str, source: str, folder: Path) -> Any:
    """Returns the kernel as a Triton function, without the decorator of Inductor that launches it."""
    source = re.sub(r"@triton_heuristics\.\w+\(.*?\n\)\n(?=@triton\.jit)", "", source, flags=re.DOTALL)
    path = folder / f"{name}.py"
    path.write_text(source.replace("triton_helpers.set_driver_to_gpu()", ""))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # Triton reads the file
    return getattr(module, name)


def compile_errors(code: str, architectures: Sequence[int]) -> dict[str, str]:
    """Returns the error message for each kernel and architecture that Triton cannot compile."""
    errors = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, source in kernels(code):
            signature, kernel = signature_of(source), kernel_of(name, source, Path(folder))
            constants = {key: BLOCKS.get(key, 1) for key, kind in signature.items() if kind == "constexpr"}
            if "R0_BLOCK" in constants and "XBLOCK" in constants:
                constants["XBLOCK"] = 1
            for sm in architectures:
                parsed = ASTSource(fn=kernel, signature=signature, constexprs=constants)
                try:
                    triton.compile(parsed, target=GPUTarget("cuda", sm, 32))
                except Exception as error:
                    errors[f"{name} sm_{sm}"] = f"{type(error).__name__}: {error}"[-500:]
    return errors


class InterpretedKernel:
    """A pointwise kernel in Triton's interpreter, with the interface that a generated module calls."""

    def __init__(self, name: str, source: str, folder: Path) -> None:
        self._kernel, self._signature = kernel_of(name, source, folder), signature_of(source)

    def run(self, *arguments: Any, stream: object) -> None:
        blocks = {name: BLOCKS[name] for name, kind in self._signature.items() if kind == "constexpr"}
        sizes = dict(zip(self._signature, arguments, strict=False))
        grid = [-(-sizes[f"{axis}numel"] // blocks[f"{axis.upper()}BLOCK"]) for axis in "xy" if f"{axis}numel" in sizes]
        self._kernel[tuple(grid)](*arguments, **blocks)


def run_interpreted(code: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Runs a generated module in Triton's interpreter on CPU tensors. Returns its outputs."""

    def empty(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype)

    with tempfile.TemporaryDirectory() as folder:
        names: dict[str, Any] = {name: InterpretedKernel(name, source, Path(folder)) for name, source in kernels(code)}
        names |= {
            "torch": torch,
            "empty_strided_cuda": empty,
            "reinterpret_tensor": torch._C._dynamo.guards._reinterpret_tensor,
            "assert_size_stride": lambda *_: None,
            "get_raw_stream": lambda device: device,
        }
        exec(code[code.index("class Runner:") : code.index("runner = Runner(")], names)
        with mock.patch.object(torch, "cuda", mock.MagicMock()):
            return list(names["Runner"](partitions=[]).call(list(inputs)))


def step_code(path: Path) -> str:
    """Returns the generated code of the whole reverse step of a checkpoint in bfloat16."""
    program = ReverseStep(checkpoint.load(path), torch.device("cpu"), torch.bfloat16)
    program.call_rows = CallRows()  # a GPU has no limits for the number of rows
    flat, shape = FlatStep(program), program.checkpoint.image_shape
    tensors = dict(flat.named_parameters()) | dict(flat.named_buffers())

    def step(*arguments: Tensor) -> Any:
        named = dict(zip(tensors, arguments[: len(tensors)], strict=True))
        return torch.func.functional_call(flat, named, arguments[len(tensors) :])

    counts = EVALUATIONS, EVALUATIONS, EVALUATIONS, ROWS, ROWS  # of the fields of Rows
    rows = [torch.empty(n, dtype=torch.int64) for n in counts]
    noise_of_steps = torch.empty(SLOTS, NOISE_STEPS, *shape)  # A GPU draws the noise before the steps.
    state = [*State.zeros(SLOTS, shape, torch.device("cpu")), noise_of_steps, torch.empty(PLANS, PLAN_COLUMNS)]
    # The trace is made on a CPU, but must contain the operations for a GPU.
    with gpu_operations(), mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        return generate(step, [*tensors.values(), *state, *rows])


def noise_differences() -> dict[str, float]:
    """Compares interpreted kernels with the CPU. Returns the number of different words and the maximum error."""
    seed = torch.tensor([0, 1, 2**53 - 1, 123456789012, 7, 8, 9, 2**32])
    index, step = torch.arange(8), torch.tensor([0, 1, 2, 50, 99, 100, 3, 4])
    inputs = [seed, index, step, noise.block_counter((1, 28, 28), seed.device)]

    def words_and_noise(seed: Tensor, index: Tensor, step: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        return (
            noise.random_words(seed, index, step, block),
            noise.normal(seed, index, step, (1, 28, 28), block),
        )

    words, z = run_interpreted(generate(words_and_noise, inputs), inputs)
    expected_words, expected_z = words_and_noise(*inputs)
    return {
        "words": words.numel(),
        "different_words": int((words != expected_words).sum()),
        "normal_error": float((z - expected_z).abs().max()),
    }


def main(arguments: Sequence[str]) -> None:
    pretend_gpu()
    if arguments[0] == "noise":
        print(json.dumps(noise_differences()))
        return
    code = step_code(Path(arguments[1]))
    errors = compile_errors(code, [int(sm) for sm in arguments[2:]])
    print(json.dumps({"kernels": len(list(kernels(code))), "launches": count_launches(code), "errors": errors}))


if __name__ == "__main__":
    main(sys.argv[1:])
