"""A pipeline as a model of the service: its specification, its samplers and its plans.

Generation follows a scheduler of diffusers. All other paths, such as those that fill in an image, are those of the
project's own samplers, because alpha_bar is all that they need. The timestep t of the project is t - 1 in diffusers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.checkpoint import CheckpointError, Probe
from model.noise import normal
from model.pipelines.folder import Pipeline
from model.pipelines.sampling import run_plan
from model.pipelines.schedulers import PipelinePlan, Scheduler, StepOfPlan
from model.pipelines.step import PipelineStep
from model.pixels import from_pixels, to_pixels
from model.sampler import plan_through
from model.schedule import MIN_ALPHA_BAR, Schedule
from model.spec import MOST_DEFAULT_STEPS, PIPELINE_SAMPLERS, Guidance, ModelSpec, Process, Sampler, TrainingFacts

SCHEDULERS: dict[Sampler, str] = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpmpp": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
ONLY_CLASS = "image"  # the name of the class of a network without classes


class PipelineModel:
    """A pipeline with what the service asks of a model. A network without classes has one, so requests need no label.

    `probe` and `probe_image` have the purpose that they have in a checkpoint. A pipeline has no stored image, so it is
    computed here, in float32, from one step in the middle of the schedule. A step from T would multiply the rounding
    errors of bfloat16 by hundreds.
    """

    def __init__(self, pipeline: Pipeline, null_label: int | None = None) -> None:
        """`null_label` is the label that meant "no class" in the training. It permits guidance.

        Raises CheckpointError if the pipeline has no such label, or no sampler can use its schedule.
        """
        self.network, self.image_shape, self.sha256 = pipeline.network, pipeline.image_shape, pipeline.sha256
        self.weights_sha256 = self.sha256
        self.architecture = pipeline.architecture
        num_labels = max(pipeline.num_classes, 1)
        if null_label is not None and (not 0 <= null_label < num_labels or num_labels < 2):
            raise CheckpointError(f"the label {null_label} cannot mean 'no class': the network has {num_labels} labels")
        self.labels = [label for label in range(num_labels) if label != null_label]
        self.null_label = null_label
        try:
            self.schedule = Schedule(_alpha_bar(pipeline.scheduler.betas))
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        self._schedulers = _schedulers_of(pipeline.scheduler)
        self._has_plan: dict[tuple[Sampler, int], bool] = {}
        self.spec = self._spec(pipeline.class_names)
        self.probe = Probe(digit=0, num_steps=1, sampler=self.spec.samplers[0])
        self.probe_path = (max(self.schedule.num_steps // 2, 1), 0)
        self.probe_image = self._draw_probe()

    def _spec(self, class_names: Sequence[str]) -> ModelSpec:
        return ModelSpec(
            class_names=tuple(class_names[label] for label in self.labels) if class_names else (ONLY_CLASS,),
            image_shape=self.image_shape,
            schedule=self.schedule,
            steps=(),
            samplers=tuple(self._schedulers),
            guidance={sampler: self.guidance_of(sampler) for sampler in self._schedulers},
            guidable=self.null_label is not None,
            training=TrainingFacts(),
            normalises_drawings=False,
            is_pipeline=True,
            has_plan=self.has_plan,
        )

    def step(self, device: torch.device, dtype: torch.dtype) -> PipelineStep:
        """Returns the step program. It moves the network to the device."""
        null = self.labels[0] if self.null_label is None else self.null_label
        return PipelineStep(self.network, self.image_shape, [*self.labels, null], self.architecture, device, dtype)

    def has_plan(self, sampler: Sampler, num_steps: int) -> bool:
        """Returns True if the scheduler of this sampler has a plan for this number of steps."""
        if (sampler, num_steps) not in self._has_plan:
            self._has_plan[sampler, num_steps] = self._schedulers[sampler].has_plan(num_steps)
        return self._has_plan[sampler, num_steps]

    def guidance_of(self, sampler: Sampler) -> Guidance:
        """Returns the recommended guidance of a sampler: none. Requests can set a scale for the whole schedule."""
        return Guidance(stop=self.schedule.num_steps)

    def plan(self, process: Process, num_steps: int, path: Sequence[int] = ()) -> PipelinePlan:
        """Returns the plan for a path, or the plan of the scheduler of a sampler for `num_steps` steps.

        Euler's method is DDIM, except for the timesteps. So it follows a path like DDIM.
        """
        if not path and process in self._schedulers:
            return self._schedulers[process].plan(num_steps)
        plan = plan_through(self.schedule, "ddim" if process == "euler" else process, path)
        scheduler, steps = next(iter(self._schedulers.values())), []
        for t, a, b, c, s, of_known, of_x_t in plan.table(torch.device("cpu")).tolist():
            mix = scheduler.mix(self.schedule.signal_and_noise(round(t)))
            steps.append(StepOfPlan(t - 1, a, b, *mix, c=c, s=s, of_known=of_known, of_x_t=of_x_t, clip=1.0))
        return PipelinePlan.of(steps)

    def timesteps(self, sampler: Sampler, num_steps: int, path: Sequence[int] = ()) -> list[int]:
        """Returns the timestep of each step of a sampler, with the arguments of `plan`."""
        t = self.plan(sampler, num_steps, path).rows[:, 0].round() + 1
        return [int(each) for each in t.clamp(1, self.schedule.num_steps).tolist()]

    def _draw_probe(self) -> Tensor:
        """Returns x_0 (C, H, W) in [-1, 1], as 8-bit values."""
        seed, index = torch.tensor([self.probe.seed]), torch.tensor([0])
        noise = torch.stack([normal(seed, index, torch.tensor([step]), self.image_shape) for step in range(2)])
        plan = self.plan(self.probe.sampler, 1, self.probe_path)
        try:
            *_, (_, x_0) = run_plan(self.network, plan, noise, torch.tensor(self.labels[:1]))
        except Exception as error:  # a configuration can be valid for each layer, but not for all of them
            raise CheckpointError(f"the network cannot run: {error}".splitlines()[0]) from error
        if not x_0.isfinite().all():
            raise CheckpointError("the network returns values that are not finite")
        return from_pixels(to_pixels(x_0[0]))


def _alpha_bar(betas: Tensor) -> Tensor:
    """Returns alpha_bar for t = 0..T, (T + 1,) float64. With zero terminal SNR, the last value is tiny instead of 0."""
    alpha_bar = torch.cumprod(1 - betas.double(), dim=0).clamp(min=MIN_ALPHA_BAR)
    return torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar])


def _schedulers_of(own: Scheduler) -> dict[Sampler, Scheduler]:
    """Returns the schedulers that have a plan, by sampler. The first one is the pipeline's own.

    Raises CheckpointError if the pipeline's own has none.
    """
    first = next(sampler for sampler, name in SCHEDULERS.items() if name == own.name)
    schedulers = dict[Sampler, Scheduler]()
    for sampler in (first, *(other for other in PIPELINE_SAMPLERS if other != first)):
        try:
            scheduler = own if sampler == first else own.replaced_by(SCHEDULERS[sampler])
            most = min(own.num_timesteps, MOST_DEFAULT_STEPS)
            scheduler.plan(next((count for count in range(most, 0, -1) if scheduler.has_plan(count)), 1))
            schedulers[sampler] = scheduler
        except ValueError as error:
            if sampler == first:
                raise CheckpointError(str(error)) from error
    return schedulers
