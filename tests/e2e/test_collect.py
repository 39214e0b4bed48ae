"""scripts.collect downloads digits from a running service into a folder that can be evaluated."""

from pathlib import Path

import pytest

from scripts import collect
from scripts.evaluation.samples import read_facts, read_samples
from tests.e2e.service import Service, open_png


def test_collected_files_equal_the_images_of_the_service(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "IMAGES_PER_REQUEST", 8)  # 10 images of each digit need two requests
    out, options = tmp_path / "served", ["--num-steps=2", "--sampler=ddim", "--guidance-scale=1"]
    collect.main([service.url, "--num-images=100", "--seed=40", *options, f"--out={out}"])
    body = {"num_steps": 2, "sampler": "ddim", "guidance_scale": 1}
    last = service.images(digit=9, count=2, seed=59, **body)
    assert [(out / f"digit-9-seed-59-{i}.png").read_bytes() for i in range(2)] == last
    read = read_samples(out)
    assert read.labels.bincount().tolist() == [10] * 10
    assert any((image[0].numpy() == open_png(last[0])[0]).all() for image in read.images)
    facts = read_facts(out)
    assert (facts["asked"], facts["seed"]) == (body, 40)
    assert facts["models"][0]["name"] == "default"


def test_folder_that_is_not_empty_is_not_changed(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(SystemExit):
        collect.main([service.url, "--num-images=10", f"--out={tmp_path}"])
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("option", ["--num-steps=101", "--model=none"])
def test_rejected_request_is_a_one_line_error_with_status_2(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        collect.main([service.url, "--num-images=10", option, f"--out={tmp_path / 'new'}"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "answered with status 422" in error
    assert len(error.strip().splitlines()) == 1


def test_unreachable_service_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        collect.main(["http://127.0.0.1:9", "--num-images=10", f"--out={tmp_path / 'new'}"])
    assert "No answer from http://127.0.0.1:9/health" in capsys.readouterr().err
