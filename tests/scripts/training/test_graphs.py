import contextlib
import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.prediction import PredictionConfig
from model.sampler import Guidance
from scripts.training.distillation import IMAGE_SEED, DistillationObjective, TeacherImages
from scripts.training.graphs import NUM_WARM_UP, CudaGraph, GraphedStep, Step
from scripts.training.objective import DenoisingObjective, Objective
from scripts.training.recipe import AdversaryRecipe, DistillationRecipe, Recipe
from scripts.training.trainer import Trainer
from tests.scripts.tiny_training import NUM_IMAGES, NUM_STEPS, noise_data, recipe_of
from tests.scripts.training.fake_graph import FakeGraph
from tests.scripts.training.operations import Operations, depends_on_values, replace_what_meta_lacks

EXACT_ADAM = {"name": "adam", "lr": 0.125, "betas": [0.9, 0.999], "weight_decay": 0.0}  # the rate is exact in float32


def denoising(recipe: Recipe, device: torch.device) -> DenoisingObjective:
    data = noise_data()
    return DenoisingObjective(recipe, data.learn, data.validate, device)


def distillation(recipe: Recipe, device: torch.device) -> DistillationObjective:
    data, index = noise_data(), torch.arange(NUM_IMAGES)
    pixels = torch.cat([data.learn.images, data.validate.images])
    images = TeacherImages(pixels, index % 10, index, IMAGE_SEED)
    weights = torch.randn(784, 10, generator=torch.Generator().manual_seed(1)).to(device)
    return DistillationObjective(recipe, images, data.learn, device, classify=lambda x_0: x_0.flatten(1) @ weights)


def student_recipe() -> Recipe:
    table = DistillationRecipe(
        num_steps=(3, 1),
        teacher_steps=6,
        num_images=NUM_IMAGES - 2,
        num_held_out=2,
        guidance=Guidance(2.0, 3, NUM_STEPS),
        image_weight=1.0,
        recognition_weight=0.5,
    )
    adversary = AdversaryRecipe(width=8, lr=1e-3, gradient_weight=0.1)
    fields: dict[str, Any] = {"guidance": Guidance(), "label_drop": 0.0, "prediction": PredictionConfig("v")}
    return recipe_of("cosine", distillation=table, adversary=adversary, **fields)


CASES: dict[str, tuple[Callable[[], Recipe], Callable[[Recipe, torch.device], Objective]]] = {
    "cosine": (lambda: recipe_of("cosine"), denoising),
    "v, min-SNR": (lambda: recipe_of("cosine", prediction=PredictionConfig("v"), min_snr_gamma=5.0), denoising),
    "plateau": (lambda: recipe_of("plateau", optimizer=EXACT_ADAM), denoising),
    "student": (student_recipe, distillation),
}


def make_trainer(case: str, *, device: str = "cpu", **options: Any) -> Trainer:
    make_recipe, make_objective = CASES[case]
    recipe, place = make_recipe(), torch.device(device)
    return Trainer(recipe, make_objective(recipe, place), seed=0, device=place, compiled=False, **options)


class Graphs:
    """Makes fake graphs, and keeps the last one."""

    last: FakeGraph

    def __call__(self, generator: torch.Generator) -> FakeGraph:
        self.last = FakeGraph(generator)
        return self.last


def graph_trainer(case: str) -> tuple[Trainer, Graphs]:
    graphs = Graphs()
    return make_trainer(case, make_graph=graphs), graphs


def spoil_inputs(trainer: Trainer, graphs: Graphs) -> None:
    """Makes replays overwrite the inputs that are set before each step."""
    graphs.last.inputs = [trainer._rows, trainer._new_weight]  # the learning rate is read at the end of an epoch


def differing_weights(one: Trainer, other: Trainer) -> list[str]:
    """Returns the names of the weights, averaged weights and optimizer values that differ in a bit."""
    names = []
    for kind in ("network", "averaged"):
        a, b = getattr(one, kind).state_dict(), getattr(other, kind).state_dict()
        names += [f"{kind}.{name}" for name in a if not torch.equal(a[name], b[name])]
    optimizers = [trainer.optimizer.state_dict() for trainer in (one, other)]
    adversaries = [trainer.objective.state_dict() for trainer in (one, other)]
    if adversaries[0]:
        a, b = (state["network"] for state in adversaries)
        names += [f"adversary.{name}" for name in a if not torch.equal(a[name], b[name])]
        optimizers += [state["optimizer"] for state in adversaries]
    for pair in zip(optimizers[::2], optimizers[1::2], strict=True):
        a, b = (optimizer["state"] for optimizer in pair)
        names += [f"{i}.{name}" for i in a for name in a[i] if not torch.equal(a[i][name], b[i][name])]
    return names


@pytest.fixture
def float32_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds each learning rate to float32. A graph reads it from a float32 tensor, the plain loop from a float."""
    exact = Trainer._cosine_rate
    monkeypatch.setattr(Trainer, "_cosine_rate", lambda *args: torch.tensor(exact(*args)).item())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("float32_rates")
def test_training_with_a_graph_gives_the_same_bits_as_the_plain_loop(case: str) -> None:
    plain, (graphed, graphs) = make_trainer(case), graph_trainer(case)
    spoil_inputs(graphed, graphs)
    for _ in range(3):
        assert plain.run_epoch() == graphed.run_epoch()
    assert differing_weights(plain, graphed) == []
    assert graphs.last.num_warm_ups == NUM_WARM_UP
    assert graphs.last.num_captures == 1
    assert graphs.last.num_replays == 3 * plain.steps_per_epoch - NUM_WARM_UP


def test_learning_rate_after_a_plateau_reaches_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, (graphed, _) = make_trainer("plateau"), graph_trainer("plateau")
    for trainer in (plain, graphed):
        losses = iter([0.5, 0.4, 0.4, 0.3])
        monkeypatch.setattr(trainer.objective, "validation_losses", lambda _, losses=losses: (next(losses), (0.0,)))
    rates = [(plain.run_epoch().learning_rate, graphed.run_epoch().learning_rate) for _ in range(4)]
    assert rates == [(0.125, 0.125)] * 3 + [(0.0625, 0.0625)]
    assert differing_weights(plain, graphed) == []


@pytest.mark.parametrize("case", ["cosine", "plateau", "student"])
def test_resumed_training_with_a_graph_gives_the_same_bits_as_an_uninterrupted_one(case: str) -> None:
    (whole, _), (first, _), (second, graphs) = (graph_trainer(case) for _ in range(3))
    for _ in range(3):
        whole.run_epoch()
    first.run_epoch()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    spoil_inputs(second, graphs)
    for _ in range(2):
        second.run_epoch()
    assert differing_weights(whole, second) == []


def test_loading_a_state_replaces_the_graph() -> None:
    """The graph of before would update the optimizer's earlier tensors."""
    (trained, _), (other, graphs) = graph_trainer("cosine"), graph_trainer("cosine")
    other.run_epoch()
    replaced = graphs.last
    trained.run_epoch()
    other.load_state_dict(copy.deepcopy(trained.state_dict()))
    assert graphs.last is not replaced
    assert other.run_epoch() == trained.run_epoch()
    assert differing_weights(trained, other) == []


@pytest.mark.parametrize("first_has_a_graph", [False, True])
@pytest.mark.usefixtures("float32_rates")
def test_state_can_be_resumed_with_and_without_a_graph(first_has_a_graph: bool) -> None:
    (graphed, graphs), plain = graph_trainer("cosine"), make_trainer("cosine")
    spoil_inputs(graphed, graphs)
    first, second = (graphed, plain) if first_has_a_graph else (plain, graphed)
    first.run_epoch()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert first.run_epoch() == second.run_epoch()
    assert differing_weights(first, second) == []


@pytest.mark.parametrize("case", CASES)
def test_no_operation_of_a_step_depends_on_values_of_the_device(case: str) -> None:
    trainer, graphs = graph_trainer(case)
    trainer.run_epoch()
    assert len(graphs.last.calls) > 100
    assert [func for func, arguments in graphs.last.calls if depends_on_values(func, arguments)] == []


def test_host_reads_a_loss_only_to_report_progress() -> None:
    trainer, reports = make_trainer("cosine"), []
    trainer.steps_per_report = 3
    with Operations() as operations:
        trainer.run_epoch(lambda count, loss: reports.append((count, operations.num_reads)))
    assert reports == [(3, 1), (1, 2)]


def test_a_graph_that_reads_a_stale_input_is_detected() -> None:
    """Tests the fake graph: an input that is not set again before a replay."""
    trainer, graphs = graph_trainer("cosine")
    graphs.last.inputs = [trainer._rows, next(trainer.network.parameters())]
    trainer.run_epoch()
    weights = trainer.network.state_dict().values()
    assert any(tensor.isnan().any() for tensor in weights)


def test_a_graph_repeats_numbers_of_the_host() -> None:
    """Tests the fake graph: a step that counts on the host."""
    calls = itertools.count()
    graphed = GraphedStep(lambda: torch.zeros(()) + next(calls), FakeGraph(torch.Generator()))
    results = [graphed().item() for _ in range(NUM_WARM_UP + 3)]
    assert results == [*range(NUM_WARM_UP + 1), NUM_WARM_UP, NUM_WARM_UP]


def test_each_replay_draws_the_next_random_numbers_of_the_generator() -> None:
    generator, same = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    graphed = GraphedStep(lambda: torch.randn(3, generator=generator), FakeGraph(generator))
    for _ in range(NUM_WARM_UP + 3):
        assert torch.equal(graphed(), torch.randn(3, generator=same))


class CudaCalls:
    """Replaces torch.cuda, and records the calls of a CudaGraph in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self._object("graph"))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self._object("side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self._object("current"))
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self._block(f"on {stream.name}"))
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: self._block(f"capture on {stream.name}"))

    def record(self, call: str) -> Tensor:
        self.calls.append(call)
        return torch.zeros(())

    def _object(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            register_generator_state=lambda generator: self.record("register the generator"),
            wait_stream=lambda other: self.record(f"{name} waits for {other.name}"),
            replay=lambda: self.record("replay"),
        )

    @contextlib.contextmanager
    def _block(self, name: str) -> Iterator[None]:
        self.record(name)
        yield
        self.record("end")


def test_cuda_graph_warms_up_and_records_on_the_same_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of a step that began on another stream could not be recorded."""
    cuda = CudaCalls(monkeypatch)
    graphed = GraphedStep(lambda: cuda.record("step"), CudaGraph(torch.Generator()))
    for _ in range(NUM_WARM_UP + 2):
        graphed()
    warm_up = ["side waits for current", "on side", "step", "end", "current waits for side"]
    assert cuda.calls == [
        "register the generator",
        *warm_up * NUM_WARM_UP,
        *["capture on side", "step", "end", "replay"],
        "replay",
    ]


def test_cuda_graph_hides_only_the_warning_about_steps_that_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    CudaCalls(monkeypatch)

    def warn(message: str) -> Tensor:
        warnings.warn(message, stacklevel=1)
        return torch.zeros(())

    graph = CudaGraph(torch.Generator())
    graph.warm_up(lambda: warn("This instance was constructed with capturable=True, but step() runs uncaptured"))
    with pytest.raises(UserWarning, match="another"):
        graph.warm_up(lambda: warn("another"))


@pytest.mark.parametrize("case", CASES)
def test_a_step_on_a_device_without_values_copies_nothing_from_or_to_the_host(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_what_meta_lacks(monkeypatch)
    trainer = make_trainer(case, device="meta")
    rows = torch.arange(8, device="meta")
    trainer._learn_from(rows, 0)
    with Operations() as operations:
        loss = trainer._learn_from(rows, 1)
    assert loss.device.type == "meta"
    assert operations.num_calls > 100
    assert (operations.copies, operations.num_reads) == ([], 0)


def test_a_read_on_a_device_without_values_is_detected() -> None:
    with Operations() as operations, pytest.raises(RuntimeError, match="meta"):
        torch.ones(3, device="meta").sum().item()
    assert (operations.num_reads, operations.copies) == (1, [])


def test_a_copy_from_a_device_without_values_is_detected() -> None:
    with Operations() as operations, pytest.raises(NotImplementedError, match="meta"):
        torch.ones(3, device="meta").cpu()
    assert (operations.num_reads, len(operations.copies)) == (0, 1)


def test_a_copy_to_a_device_without_values_is_detected() -> None:
    with Operations() as operations:
        torch.ones(3).to("meta")
    assert (operations.num_reads, len(operations.copies)) == (0, 1)


class DirectGraph:
    """Runs the step itself in each replay."""

    def __init__(self, generator: torch.Generator) -> None:
        self._step: Step | None = None
        self._result = torch.zeros((), device=generator.device)

    def warm_up(self, step: Step) -> Tensor:
        return step()

    def capture(self, step: Step) -> Tensor:
        self._step = step
        return self._result

    def replay(self) -> None:
        assert self._step
        self._result.copy_(self._step())


@pytest.mark.gpu
def test_training_with_a_cuda_graph_gives_the_losses_of_direct_steps_on_a_gpu() -> None:
    graphed, direct = (
        make_trainer("cosine", device="cuda"),
        make_trainer("cosine", device="cuda", make_graph=DirectGraph),
    )
    for _ in range(3):
        one, other = graphed.run_epoch(), direct.run_epoch()
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-2)
        assert one.validation_loss == pytest.approx(other.validation_loss, rel=1e-2)


@pytest.mark.gpu
def test_steps_do_not_wait_for_the_gpu() -> None:
    trainer = make_trainer("cosine", device="cuda")
    rows = torch.arange(8, device="cuda")
    for step in range(NUM_WARM_UP + 1):  # the recording itself waits once
        trainer._learn_from(rows, step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(NUM_WARM_UP + 1, 12):
            trainer._learn_from(rows, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
