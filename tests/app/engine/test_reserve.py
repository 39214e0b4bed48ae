"""Tests of the reserve for small jobs."""

import pytest

from app import errors
from app.engine.admission import Admission
from app.engine.batcher import StepLimits
from app.engine.job import RESERVE_SHARE, Job, StepKind
from app.engine.reserve import CAPACITY_EVALUATIONS, Reserve, cost_of
from app.engine.step_times import Curve, StepTimes
from tests.app.engine.virtual_service import MEASURED, Client, VirtualService, clients
from tests.app.fakes import new_job

STEP_TIMES = StepTimes({1: 1.0, 4: 2.0, 8: 3.0, 16: 5.0})  # short steps have 8 evaluations, full steps 16
LIMITS = StepLimits.of(STEP_TIMES, None, StepKind(("default",), 2, has_clip=False), auto=True)
NOW = 50.0


def job(count: int = 1, **fields: object) -> Job:
    return new_job(count, **{"num_steps": 10, "submitted_at": NOW, **fields})  # type: ignore[arg-type]


def at_risk_admission() -> tuple[Admission, Job]:
    """Returns an admission with a job of 16 images whose target is at risk, but which is not lost."""
    admission = Admission(1024, None)
    admission.open(STEP_TIMES.copy())
    large = job(16, timeout=230)
    admission.admit(large, NOW)
    admission.step_times.slowdown = 1.2
    return admission, large


def test_reserve_gets_a_tenth_of_the_time_of_each_step_up_to_its_capacity() -> None:
    reserve = Reserve(LIMITS.full.rate)
    assert reserve.seconds == reserve.capacity == pytest.approx(CAPACITY_EVALUATIONS / (15 / 4.75))
    reserve.seconds = 0.0
    for seconds in (1.0, 3.0, 5.0):
        reserve.add_step(seconds)
    assert reserve.seconds == pytest.approx(RESERVE_SHARE * (1.0 + 3.0 + 5.0))
    for _ in range(1000):
        reserve.add_step(5.0)
    assert reserve.seconds == reserve.capacity


def test_step_costs_the_time_that_the_other_jobs_lose() -> None:
    """8 evaluations take 3 s. Full steps compute the 6 evaluations of the other jobs in 6 / R seconds."""
    reserve = Reserve(LIMITS.full.rate)
    reserve.pay(3.0, 6, LIMITS.full.rate)
    assert reserve.seconds == pytest.approx(reserve.capacity - (3.0 - 6 / LIMITS.full.rate))


def test_wait_is_the_time_in_which_the_income_pays_for_all_reserved_jobs() -> None:
    """Two jobs have their rows in the same steps: a step with both has the loss of a short step once."""
    reserve, first, second = Reserve(LIMITS.full.rate), job(), job()
    assert cost_of(LIMITS, [first]) == pytest.approx(10 / LIMITS.full.rate + 10 * LIMITS.loss)
    assert cost_of(LIMITS, [first, second]) == pytest.approx(20 / LIMITS.full.rate + (10 / 8 + 10) * LIMITS.loss)
    assert reserve.wait_for(LIMITS, [first, second]) == 0.0
    reserve.seconds = 1.0
    expected = (cost_of(LIMITS, [first, second]) - 1.0) / RESERVE_SHARE
    assert reserve.wait_for(LIMITS, [first, second]) == pytest.approx(expected)


@pytest.mark.parametrize("model", ["default", "fast"])
@pytest.mark.parametrize("clip_seconds", [0.0, 0.011])
@pytest.mark.parametrize("max_batch", [None, 8, 32])
def test_cost_of_a_reserved_job_is_at_most_the_predicted_one(
    max_batch: int | None, clip_seconds: float, model: str
) -> None:
    """A call of another network, or of CLIP, also makes the rows of the other jobs take longer."""
    service = VirtualService(max_batch, measured=MEASURED, clip_seconds=clip_seconds)
    admission, reserve = service.admission, service.admission.reserve
    clip = StepTimes(MEASURED, clip_seconds).clip_evaluations
    service.submit(Client("large", count=64, timeout=9.0).job(0.0))
    admission.step_times.slowdown = 1.75
    service.slowness = lambda now: 1.75
    small = Client("small", num_steps=5, guided=False, timeout=20, model=model, clip_evaluations=clip).job(service.now)
    admission.backlog.add(small, is_reserved=True)
    assert admission._is_at_risk(service.now)
    predicted, paid = cost_of(admission._reserve_limits(), [small]), list[float]()
    pay = reserve.pay

    def count(seconds: float, others: int, rate: float) -> None:
        paid.append(seconds - others / rate)
        pay(seconds, others, rate)

    reserve.pay = count  # type: ignore[method-assign]
    while small.unfinished:
        service.step()
    assert len(paid) == 5
    assert 0 < sum(paid) <= predicted


def test_reserve_saves_until_it_pays_for_all_reserved_rows_that_fit() -> None:
    """Each step with reserved rows has the loss of a short step once."""
    admission, _ = at_risk_admission()
    reserve, limits, jobs = admission.reserve, admission._reserve_limits(), [job(1), job(1)]
    for each in jobs:
        admission.backlog.add(each, is_reserved=True)
    cost = 1 / limits.full.rate
    reserve.seconds = limits.loss + 1.5 * cost
    assert reserve.paid_rows(limits, jobs, []) == []
    reserve.seconds = limits.loss + 2.5 * cost
    assert {row.job for row in reserve.paid_rows(limits, jobs, [])} == set(jobs)
    reserve.seconds = reserve.capacity = limits.loss + 1.5 * cost  # it cannot save more
    assert len(reserve.paid_rows(limits, jobs, [])) == 1


def test_other_small_jobs_get_only_what_the_reserved_jobs_do_not_need() -> None:
    reserve, reserved, other = Reserve(LIMITS.full.rate), job(1), job(1)
    reserved.is_reserved = True
    unpaid, cost = cost_of(LIMITS, [reserved]), 1 / LIMITS.full.rate
    reserve.seconds = LIMITS.loss + unpaid + 0.5 * cost
    assert [row.job for row in reserve.paid_rows(LIMITS, [reserved], [other])] == [reserved]
    reserve.seconds = LIMITS.loss + unpaid + 1.5 * cost
    assert [row.job for row in reserve.paid_rows(LIMITS, [reserved], [other])] == [reserved, other]


def test_reserve_pays_for_at_most_half_of_a_full_step() -> None:
    reserve, jobs = Reserve(LIMITS.full.rate), [job(1, num_steps=1) for _ in range(12)]
    for each in jobs:
        each.is_reserved = True
    assert cost_of(LIMITS, jobs) < reserve.seconds
    assert [row.job for row in reserve.paid_rows(LIMITS, jobs, [])] == jobs[: LIMITS.evaluations // 2]


def test_capacity_does_not_depend_on_the_jobs() -> None:
    """A job with CLIP guidance or of a slow model lowers the rate of full steps, but not what the bounds contain."""
    admission = Admission(1024, None)
    admission.open(StepTimes({1: 1e-3, 16: 7e-3}, clip_seconds=0.1, of_models={"fast": {1: 10e-3, 16: 70e-3}}))
    kinds = [
        StepKind(("default",), 2, False),
        StepKind(("default", "fast"), 2, False),
        StepKind(("default",), 60, True),
    ]
    assert len({admission._limits_for(kind).full.rate for kind in kinds}) == 3
    assert {admission._full(kind).reserve_seconds for kind in kinds} == {admission.reserve.capacity}


def test_job_that_makes_steps_longer_is_refused_if_a_reserved_job_would_be_late() -> None:
    admission, large = at_risk_admission()
    admission.step_times._of_models["fast"] = Curve({1: 40.0, 16: 200.0})
    small = job(1, timeout=200)
    admission.admit(small, NOW)
    assert small.is_reserved
    admission.backlog.remove(large)
    with pytest.raises(errors.Overloaded):
        admission.admit(job(1, model="fast", timeout=1e6), NOW)
    admission.admit(job(1, timeout=1e6), NOW)
    admission.backlog.remove(small)
    admission.admit(job(1, model="fast", timeout=1e6), NOW)


def test_job_that_ends_during_a_step_leaves_nothing_to_its_place_in_the_table() -> None:
    admission = Admission(1024, None)
    admission.open(STEP_TIMES.copy())
    cancelled, other = job(4), job(4)
    for each in (cancelled, other):
        admission.admit(each, NOW)
    admission.select(NOW)
    admission.backlog.start_batch()
    admission.backlog.advance()
    admission.select(NOW)
    place = cancelled.place
    admission.backlog.remove(cancelled)
    late = job(4)
    admission.admit(late, NOW)
    assert late.place == place
    admission.backlog.advance()
    assert admission.backlog._table[0, place] == late.evaluations_left == 40


def test_small_job_that_would_delay_a_job_at_risk_is_reserved_and_a_large_one_is_refused() -> None:
    admission, large = at_risk_admission()
    with pytest.raises(errors.Overloaded, match="deadline"):
        admission.admit(job(2, timeout=200), NOW)
    small = job(1, timeout=200)
    admission.admit(small, NOW)
    assert (small.is_reserved, large.is_reserved) == (True, False)
    assert admission.backlog.jobs == [small, large]


def test_step_at_risk_has_the_small_job_and_is_short() -> None:
    admission, large = at_risk_admission()
    assert len(admission.select(NOW)) == 16
    small = job(1, timeout=200)
    admission.admit(small, NOW)
    rows = admission.select(NOW)
    assert [row.job for row in rows].count(small) == 1
    assert [row.job for row in rows].count(large) == 7


def test_small_job_waits_at_risk_while_the_reserve_is_empty() -> None:
    admission, large = at_risk_admission()
    small = job(1, timeout=200)
    admission.admit(small, NOW)
    admission.reserve.seconds = 0.0
    assert {row.job for row in admission.select(NOW)} == {large}
    shares = [small in {row.job for row in admission.select(NOW)} for _ in range(100)]
    assert 0.05 < sum(shares) / 100 < 0.6  # the income pays for some of the steps


def test_small_job_within_the_bound_also_gets_a_row_at_risk() -> None:
    admission = Admission(1024, None)
    admission.open(STEP_TIMES.copy())
    large, small = job(16, timeout=280), job(1, timeout=1000)
    for each in (large, small):
        admission.admit(each, NOW)
    admission.step_times.slowdown = 1.2
    assert not small.is_reserved
    assert {row.job for row in admission.select(NOW)} == {large, small}
    admission.reserve.seconds = 0.0
    assert {row.job for row in admission.select(NOW)} == {large}


def test_reserve_does_not_pay_for_a_job_that_would_end_after_its_target() -> None:
    admission, _ = at_risk_admission()
    with pytest.raises(errors.Overloaded):
        admission.admit(job(1, timeout=10), NOW)  # ten full steps take 60 s
    admission.reserve.seconds = 0.0
    with pytest.raises(errors.Overloaded) as refused:
        admission.admit(job(1, timeout=100), NOW)
    assert 1 <= refused.value.retry_after <= 120


def test_retry_after_is_the_time_until_the_reserve_pays_unless_another_small_job_uses_its_income() -> None:
    waits = []
    for others in ([], [job(1, timeout=1000)]):
        admission, _ = at_risk_admission()
        for other in others:
            admission.admit(other, NOW)
            assert not other.is_reserved
        admission.reserve.seconds = 0.0
        with pytest.raises(errors.Overloaded) as refused:
            admission.admit(job(1, timeout=150), NOW)
        waits.append(refused.value.retry_after)
    until_it_pays, until_it_fits = waits
    assert until_it_pays < 30
    assert until_it_fits > 60  # the large job takes 80 s


def test_small_jobs_are_refused_after_they_have_used_their_share() -> None:
    admission, large = at_risk_admission()
    small = list[Job]()
    with pytest.raises(errors.Overloaded):
        while len(small) < 1000:
            small.append(job(1, timeout=200))
            admission.admit(small[-1], NOW)
    assert 3 < len(small) < 100
    assert admission.backlog.jobs == [*small[:-1], large]


def slowed(factor: float, small: Client, num_small: int = 1) -> VirtualService:
    """Returns a service after 30 s. After 1 s, the machine becomes slower by this factor."""
    service = VirtualService(slowness=lambda now: factor if now > 1.0 else 1.0)
    large = clients(1, name="large", count=64, start=0.2, think=0.3)
    small.start = 0.7
    service.run([*large, *([small] * num_small)], until=30.0)
    return service


@pytest.mark.parametrize("num_steps", [10, 100])
@pytest.mark.parametrize("factor", [3, 6, 10])
def test_small_requests_keep_their_share_on_a_machine_that_becomes_slower(factor: float, num_steps: int) -> None:
    small = Client("small", num_steps=num_steps, think=0.3)
    service = slowed(factor, small)
    result = service.result
    alone = service.alone_seconds(small) * factor
    latencies = sorted(result.latencies["small"])
    assert result.of("small").get("429", 0) == 0
    assert latencies[int(0.5 * len(latencies))] <= 5 * alone
    assert latencies[-1] <= 15 * alone
    assert result.late == []


def test_several_small_clients_are_served_while_a_target_is_at_risk() -> None:
    result = slowed(10, Client("small", num_steps=10, think=0.3), num_small=4).result
    assert result.of("small")["200"] > 100
    assert result.of("small").get("429", 0) < 0.2 * result.of("small")["200"]
    assert result.of("small").get("504", 0) == 0


def test_measured_curve_has_little_loss_in_short_steps() -> None:
    limits = StepLimits.of(StepTimes(MEASURED), None, StepKind(("default",), 2, has_clip=False), auto=True)
    assert limits.loss < 1e-3
    assert Reserve(limits.full.rate).capacity == pytest.approx(0.13, rel=0.1)
