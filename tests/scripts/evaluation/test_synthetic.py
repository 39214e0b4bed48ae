from pathlib import Path

import pytest

from scripts.evaluation import training
from scripts.evaluation.samples import Digits, SamplesError
from scripts.evaluation.synthetic import accuracy_learned_from, read_synthetic
from scripts.make_dataset import write_idx
from scripts.progress import Reporter
from tests.scripts.evaluation.bars import bars


def learned_from(digits: Digits) -> float:
    with Reporter() as reporter:
        return accuracy_learned_from(digits, bars(100, 9), reporter, epochs=3, seed=0)


def test_what_tells_the_digits_apart_teaches_and_what_does_not_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "BATCH_SIZE", 8)
    good = bars(512, 1)
    assert learned_from(good) > 0.9
    assert learned_from(Digits(good.images, good.labels.roll(3))) < 0.2


def test_a_set_is_read_as_it_was_written(tmp_path: Path) -> None:
    digits = bars(30, 2)
    write_idx(tmp_path, digits.images[:, 0].numpy())
    read = read_synthetic(tmp_path)
    assert read.images.equal(digits.images)
    assert read.labels.equal(digits.labels)


@pytest.mark.parametrize("content", [None, b"", b"seven"])
def test_a_folder_that_holds_none_is_one_sentence(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
            (tmp_path / name).write_bytes(content)
    with pytest.raises(SamplesError) as error:
        read_synthetic(tmp_path)
    assert len(str(error.value).splitlines()) == 1
