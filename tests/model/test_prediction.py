import pytest
import torch
from torch import Tensor

from model.diffusion import Diffusion
from model.prediction import KINDS, Prediction, PredictionConfig, predict_x_0
from model.schedule import Schedule, ScheduleConfig

SCHEDULE = Schedule(ScheduleConfig())
ALPHA_BAR = SCHEDULE.alpha_bar
T = torch.tensor([1, 7, 30, 60, 95, 100])
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def forward(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x_0, eps and x_t in float64."""
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.rand(len(t), 1, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    eps = torch.randn(len(t), 1, 4, 4, generator=generator, dtype=torch.float64)
    alpha_bar_t = ALPHA_BAR[t][:, None, None, None]
    return x_0, eps, alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * eps


@EVERY_KIND
def test_predict_x_0_inverts_the_target(kind: str) -> None:
    prediction = Prediction(PredictionConfig(kind), SCHEDULE)
    x_0, eps, x_t = forward(T[:-1])  # at t = 100, float32 is not precise enough to recover x_0 from eps
    target = prediction.target(x_0, eps, T[:-1])
    implied = predict_x_0(x_t, target, prediction.table(x_t.device)[T[:-1]])
    torch.testing.assert_close(implied, x_0, rtol=0, atol=1e-4)


@EVERY_KIND
def test_prediction_can_be_moved_to_a_device(kind: str) -> None:
    prediction, meta = Prediction(PredictionConfig(kind), SCHEDULE), torch.device("meta")
    x_0, eps, _ = forward(T)
    moved = prediction.to(meta)
    assert moved._target.device == meta
    assert moved.target(x_0.to(meta), eps.to(meta), T.to(meta)).device == meta
    assert prediction.target(x_0, eps, T).device == x_0.device  # the original stays where it is


def test_targets_equal_the_formulas_of_the_papers() -> None:
    x_0, eps, x_t = forward(T)
    alpha, sigma = (root[T][:, None, None, None] for root in (ALPHA_BAR.sqrt(), (1 - ALPHA_BAR).sqrt()))
    targets = {kind: Prediction(PredictionConfig(kind, 0.5), SCHEDULE).target(x_0, eps, T) for kind in KINDS}
    torch.testing.assert_close(targets["eps"], eps, rtol=0, atol=1e-6)
    torch.testing.assert_close(targets["v"], alpha * eps - sigma * x_0, rtol=0, atol=1e-6)  # Salimans & Ho, section 4
    # Karras 2022, table 1 and eq. 8, for x_t / alpha with noise sigma / alpha. The sign is the sign of v.
    noise, data = sigma / alpha, 0.5
    c_skip, c_out = data**2 / (noise**2 + data**2), noise * data / (noise**2 + data**2).sqrt()
    torch.testing.assert_close(targets["edm"], -(x_0 - c_skip * x_t / alpha) / c_out, rtol=1e-5, atol=1e-6)


def test_edm_target_has_unit_variance_for_data_with_sigma_data() -> None:
    generator = torch.Generator().manual_seed(1)
    prediction = Prediction(PredictionConfig("edm", 0.3), SCHEDULE)
    for t in (1, 20, 60, 99):
        x_0, eps = torch.randn(2, 1, 1, 200, 200, generator=generator)
        assert prediction.target(0.3 * x_0, eps, torch.tensor([t])).var() == pytest.approx(1, rel=0.05)


def test_predicted_x_0_is_clipped() -> None:
    prediction = Prediction(PredictionConfig(), SCHEDULE)
    _, eps, x_t = forward(T)
    assert predict_x_0(x_t, -3 * eps, prediction.table(x_t.device)[T]).abs().max() == 1


@EVERY_KIND
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weight_of_an_x_0_error_is_at_most_gamma(kind: str, gamma: float) -> None:
    prediction = Prediction(PredictionConfig(kind), SCHEDULE)
    diffusion = Diffusion(SCHEDULE, torch.Generator().manual_seed(0), prediction, gamma)
    x_0, eps, x_t = forward(T)
    wrong_x_0 = x_0 * 0.9
    alpha_bar_t = ALPHA_BAR[T][:, None, None, None]
    wrong_eps = (x_t - alpha_bar_t.sqrt() * wrong_x_0) / (1 - alpha_bar_t).sqrt()
    errors = diffusion.errors(prediction.target(wrong_x_0, wrong_eps, T), x_0, eps, T)
    snr = ALPHA_BAR[T] / (1 - ALPHA_BAR[T])
    expected = snr.clamp(max=gamma) * (0.1 * x_0).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(errors.double(), expected, rtol=1e-3, atol=1e-12)


def test_no_loss_weight_is_below_the_minimum_and_the_others_stay() -> None:
    v = Prediction(PredictionConfig("v"), SCHEDULE)
    usual, raised = (
        Diffusion(SCHEDULE, torch.Generator(), v, 5.0, min_weight).weights[1:] for min_weight in (0.0, 0.1)
    )
    assert usual[-1] < 1e-5  # at t = T
    torch.testing.assert_close(raised, torch.where(usual < 0.1, 0.1, usual))


@EVERY_KIND
@pytest.mark.parametrize(
    ("x_0", "predicted", "share"),
    [(-1.0, -1.2, 0.1), (-1.0, -0.8, 1), (1.0, 1.2, 0.1), (1.0, 0.8, 1), (0.9, 1.3, 1), (-0.9, -1.3, 1)],
)
def test_only_errors_beyond_black_and_white_of_such_pixels_have_the_overshoot_weight(
    kind: str, x_0: float, predicted: float, share: float
) -> None:
    prediction, t = Prediction(PredictionConfig(kind), SCHEDULE), torch.tensor([50])
    alpha_bar, eps = ALPHA_BAR[t].float(), torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
    eps_of_predicted = (x_t - alpha_bar.sqrt() * predicted) / (1 - alpha_bar).sqrt()
    images, others = torch.full_like(eps, x_0), torch.full_like(eps, predicted)
    output = prediction.target(others, eps_of_predicted, t)
    whole, reduced = (
        Diffusion(SCHEDULE, torch.Generator(), prediction, overshoot_weight=weight).errors(output, images, eps, t)
        for weight in (1.0, 0.1)
    )
    torch.testing.assert_close(reduced, share * whole)


@pytest.mark.parametrize(
    ("config", "reason"), [({"kind": "x_0"}, "unknown prediction kind"), ({"sigma_data": 0.0}, "above 0")]
)
def test_invalid_prediction_config_is_rejected(config: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PredictionConfig(**config)  # type: ignore[arg-type]
