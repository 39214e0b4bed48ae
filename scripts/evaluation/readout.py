"""Fits the constants of recognition (model.recognition.Readout) to the errors of digits, by logistic regression."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, softplus

from model.recognition import CYCLE, MAX_NUM_PAIRS, Readout

# Weights in the loss of the squared offsets, and of the squared deviations of the weights from their mean. They limit
# constants that depend on few digits. Larger weights gave more errors on digits that were not used for the fit.
DECAY, WEIGHT_DECAY = 1e-5, 3e-5
SUSPICION_DECAY = 1e-4  # weight of the squared weights of the log distances in the loss
FALSE_ALARMS = 0.01  # share of the digits that are rejected
DROPPED = 1e4  # score of a class that was not evaluated


def fit_readout(errors: Tensor, labels: Tensor, before: Readout, weights_sha256: str) -> Readout:
    """Fits weights, offsets and half_at to errors (N, K, C) of digits with labels (N,). K is a multiple of 10.

    A class that was not evaluated has NaN. It is left out of the results from this pair on. The loss is the mean
    cross-entropy of the results after each number n of pairs, with weight 1 / n.
    """
    distances = errors.double().sqrt()  # (N, K, C)
    num_pairs, num_classes = distances.shape[1:]
    prefixes = range(1, num_pairs + 1)
    given = ~distances.isnan()  # (N, K, C)
    spread = _spread(distances)  # (len(CYCLE),)
    centred = torch.nan_to_num(distances - distances.nanmean(dim=2, keepdim=True))  # (N, K, C)
    of_digit = given.gather(2, labels[:, None, None].expand(-1, num_pairs, 1))[:, :, 0]  # (N, K)
    undecided = of_digit & (given.sum(dim=2) > 1)  # (N, K); other rows have no gradient
    weights = torch.ones(len(CYCLE), dtype=torch.float64, requires_grad=True)
    offsets = torch.zeros(num_pairs, num_classes, dtype=torch.float64, requires_grad=True)
    half_at = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weights, offsets, half_at], max_iter=200, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        total = DECAY * offsets.square().sum() + WEIGHT_DECAY * (weights - weights.mean()).square().sum()
        rows, scores = torch.arange(len(labels)), torch.zeros(len(labels), num_classes, dtype=torch.float64)
        for n in prefixes:
            kept = undecided[rows, n - 1]  # (M,) a row that is undecided after n pairs was undecided before
            rows, k = rows[kept], n - 1
            weight = (weights / spread)[k % len(CYCLE)]
            scores = scores[kept] + weight * centred[rows, k] - offsets[k]  # (M, C)
            logits = (-scores / (1 + n / softplus(half_at))).masked_fill(~given[rows, k], -DROPPED)  # (M, C)
            share = 1 / n / sum(1 / each for each in prefixes)
            total = total + share * cross_entropy(logits, labels[rows], reduction="sum") / len(labels)
        total.backward()
        return total

    optimiser.step(loss)
    centred_offsets = torch.zeros(MAX_NUM_PAIRS, num_classes, dtype=torch.float64)
    centred_offsets[:num_pairs] = (offsets - offsets.mean(dim=1, keepdim=True)).detach()
    return replace(
        before,
        weights_sha256=weights_sha256,
        weights=tuple(_rounded(weights.detach() / spread)),
        offsets=tuple(tuple(_rounded(row)) for row in centred_offsets),
        half_at=round(softplus(half_at).item(), 1),
    )


def fit_suspicion(
    readout: Readout, digits: Tensor, ink: Tensor, others: Tensor, others_ink: Tensor, kinds: Tensor
) -> Readout:
    """Fits the constants that separate digits from other images, by logistic regression. Returns the new constants.

    `digits` (N, len(CYCLE)) and `others` (M, len(CYCLE)) are the errors of the most probable class in the first pairs,
    `ink` (N,) and `others_ink` (M,) come from `ink_of`. `kinds` (M,) has the number of the kind of each image. Digits
    and others have the same total weight. All kinds also have the same total weight.
    """
    design = torch.stack([ink, torch.ones_like(ink)], dim=1).double()  # (N, 2)
    typical = torch.linalg.lstsq(design, digits.double().log() / 2).solution  # (2, len(CYCLE))
    excess = torch.cat([_excess(digits, ink, typical), _excess(others, others_ink, typical)])  # (N + M, len(CYCLE))
    is_other = torch.arange(len(excess)) >= len(digits)  # (N + M,)
    of_kind = kinds.bincount()[kinds].double() * len(kinds.unique())  # (M,)
    share = torch.cat([torch.full((len(digits),), 1 / len(digits), dtype=torch.float64), 1 / of_kind]) / 2  # (N + M,)
    spread = excess[: len(digits)].std(dim=0)  # (len(CYCLE),)
    weights = torch.zeros(len(CYCLE), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = excess / spread @ weights + bias  # (N + M,)
        each = binary_cross_entropy_with_logits(logits, is_other.double(), reduction="none")
        total = (each * share).sum() + SUSPICION_DECAY * weights.square().sum()
        total.backward()
        return total

    optimiser.step(loss)
    with torch.no_grad():
        logits = excess / spread @ weights + bias  # (N + M,)
    return replace(
        readout,
        typical=tuple(tuple(_rounded(row)) for row in typical.T),
        suspicion=tuple(_rounded(weights.detach() / spread)),
        bias=round(bias.item(), 3),
        limit=round(logits[: len(digits)].quantile(1 - FALSE_ALARMS).item(), 3),
    )


def _excess(errors: Tensor, ink: Tensor, typical: Tensor) -> Tensor:
    """Returns the log distances minus those of a typical digit with this ink, (N, len(CYCLE))."""
    return errors.double().log() / 2 - ink.double()[:, None] * typical[0] - typical[1]


def _spread(distances: Tensor) -> Tensor:
    """Returns the standard deviation of the distances of one image, for each timestep of CYCLE. Scales the weights."""
    centred = distances - distances.nanmean(dim=2, keepdim=True)  # (N, K, C)
    at = [centred[:, place :: len(CYCLE)] for place in range(len(CYCLE))]
    return torch.stack([part[~part.isnan()].std() for part in at])


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 3) for value in values.tolist()]
