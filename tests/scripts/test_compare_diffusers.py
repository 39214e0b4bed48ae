import re
import warnings
from pathlib import Path

import pytest
import torch

from scripts import compare_diffusers

with warnings.catch_warnings():  # the dependencies of diffusers raise warnings
    warnings.simplefilter("ignore")
    import diffusers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler")


def write_pipeline(folder: Path, scheduler: str = SCHEDULERS[0], num_classes: int | None = None) -> Path:
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=num_classes,
    )
    diffusers.DDPMPipeline(network, getattr(diffusers, scheduler)()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_table_has_the_difference_of_each_step(
    tmp_path: Path, scheduler: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pipeline(tmp_path, scheduler, num_classes=4)
    compare_diffusers.main([str(folder), "--num-steps=12", "--label=3", "--seed=9"])
    *rows, _, last = capsys.readouterr().out.splitlines()
    differences = [float(row.split("|")[2]) for row in rows[2:]]
    assert len(differences) == 12
    assert max(differences) < 1e-5
    assert last.startswith(f"{scheduler}, 12 steps: the largest difference of one step is {max(differences):.1e}. Of ")
    assert re.search(r"(100\.00|99\.\d\d)% are equal, and the largest difference is [01] of 255\.$", last)


def test_plan_with_another_class_or_seed_differs(tmp_path: Path) -> None:
    pipeline = compare_diffusers.load_pipeline(write_pipeline(tmp_path, num_classes=4))
    plan = pipeline.scheduler.plan(5)
    visited = [compare_diffusers.run_diffusers(pipeline, 5, seed, label) for seed, label in ((1, 0), (2, 0), (1, 3))]
    assert compare_diffusers.compare(pipeline, plan, 1, 0).equal_pixels > 0.999
    assert compare_diffusers.difference(visited[1][-1], visited[0][-1]) > 0.01
    assert not torch.equal(visited[2][-1], visited[0][-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label=4"], "--label is 4, but must be at most 3"),
        (["--num-steps=1000", "--eta=2"], "eta must be 0 to 1, got 2.0"),
        (["--num-steps=0"], "--num-steps"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pipeline(tmp_path, num_classes=4)
    with pytest.raises(SystemExit):
        compare_diffusers.main([str(folder), *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_label_of_a_network_without_classes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare_diffusers.main([str(write_pipeline(tmp_path)), "--label=0"])
    assert "must be left out, because there are no classes" in capsys.readouterr().err
