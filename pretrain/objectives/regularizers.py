"""Regularizers against collapse, which spread out the predictions and, separately, the targets of a micro step.

Each regularizer is a loss of the pool, multiplied by the number of pairs because the sum is later divided by that
number, like the sums of other terms. The objective `regularized` applies it to the ends of views instead.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F

from pretrain.objectives.configs.regularizers import CodingRateConfig, RegularizerConfig, SigregConfig, VicregConfig
from pretrain.objectives.pool import Pool, local_value_global_grad

SIGREG_POINTS = 17
SIGREG_RANGE = 3.0
VICREG_EPSILON = 1e-4


Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Function from embeddings (Q, D), their validity (Q,) and the seed of the micro step to a scalar."""


class Regularizer:
    """A loss of groups of embeddings, such as the predictions and the targets of a pool."""

    def __init__(self, name: str, weight: float, loss: Loss):
        self.name, self.weight, self.loss = name, weight, loss

    def __call__(
        self,
        groups: Sequence[tuple[torch.Tensor, torch.Tensor]],
        counted: torch.Tensor,
        local_slice: slice,
        seed: torch.Tensor,
    ) -> torch.Tensor:
        """Return this rank's part of the sum: the losses of the groups times the number of this rank's units.

        A group is embeddings (Q, D) of all ranks and their validity (Q,); an empty group has no loss. `counted` (Q,) is
        True for the units of all ranks, and `local_slice` selects the units of this rank.
        """
        losses = [torch.where(valid.any(), self.loss(embeddings, valid, seed), 0.0) for embeddings, valid in groups]
        loss = torch.stack(losses).sum()
        return local_value_global_grad(loss * counted.sum(), loss * counted[local_slice].sum())

    def of_pool(self, pool: Pool, seed: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of the sum over the predictions and, separately, the targets of a pool."""
        groups = [(pool.prediction, pool.valid), (pool.target, pool.valid)]
        return self(groups, pool.valid, pool.local_slice, seed)


def build_regularizers(configs: Iterable[RegularizerConfig]) -> list[Regularizer]:
    """Return the regularizers of an objective, in the order of their configurations."""
    return [Regularizer(config.name, config.weight, _loss(config)) for config in configs]


def _loss(config: RegularizerConfig) -> Loss:
    match config:
        case VicregConfig(covariance=covariance):
            return lambda embeddings, valid, seed: vicreg(embeddings, valid, covariance)
        case SigregConfig(projections=projections):
            return lambda embeddings, valid, seed: sigreg(embeddings, valid, projections, seed)
        case CodingRateConfig(precision=precision):
            return lambda embeddings, valid, seed: coding_rate_gap(embeddings, valid, precision)
    raise TypeError(f"{type(config).__name__} has no loss in {__name__}; add it to _loss")


def vicreg(embeddings: torch.Tensor, valid: torch.Tensor, covariance: float) -> torch.Tensor:
    """Return the VICReg loss of the valid embeddings: (Q, D), (Q,) -> scalar.

    It is the mean hinge on the standard deviation of each component, plus `covariance` times the sum of the squared
    covariances over D.
    """
    count = valid.sum()
    kept = valid[:, None].to(embeddings.dtype)
    centred = (embeddings - (embeddings * kept).sum(dim=0) / count.clamp(min=1)) * kept
    matrix = centred.T @ centred / (count - 1).clamp(min=1)
    variances = matrix.diagonal()
    hinge = F.relu(1 - (variances + VICREG_EPSILON).sqrt()).mean()
    correlation = (matrix.square().sum() - variances.square().sum()) / len(matrix)
    return torch.where(count > 1, hinge + covariance * correlation, 0.0)


def sigreg(embeddings: torch.Tensor, valid: torch.Tensor, projections: int, seed: torch.Tensor) -> torch.Tensor:
    """Return the mean Epps-Pulley statistic over random directions: (Q, D), (Q,) -> scalar.

    For each direction it is the number of embeddings times the integral over t of
    |phi(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2), with phi the empirical characteristic function (arXiv 2511.08544, section
    4). The integral is computed by the trapezoidal rule on 0 to 3, and doubled for the negative half.
    """
    generator = torch.Generator().manual_seed(int(seed))
    directions = F.normalize(torch.randn(embeddings.shape[1], projections, generator=generator), dim=0).to(
        embeddings.device, non_blocking=True
    )
    points = torch.linspace(0, SIGREG_RANGE, SIGREG_POINTS, device=embeddings.device)
    step = SIGREG_RANGE / (SIGREG_POINTS - 1)
    normal = (-points.square() / 2).exp()
    weights = 2 * step * normal * torch.where((points == 0) | (points == SIGREG_RANGE), 0.5, 1.0)
    angles = (embeddings @ directions)[:, :, None] * points
    kept, count = valid[:, None, None].to(embeddings.dtype), valid.sum()
    real, imaginary = ((part * kept).sum(dim=0) / count.clamp(min=1) for part in (angles.cos(), angles.sin()))
    return (((real - normal).square() + imaginary.square()) @ weights).mean() * count


def coding_rate_gap(embeddings: torch.Tensor, valid: torch.Tensor, precision: float) -> torch.Tensor:
    """Return the gap to the largest possible coding rate, in nats per embedding: (Q, D), (Q,) -> scalar.

    The coding rate of N unit vectors Z is 1/2 logdet(I + D / (N epsilon^2) Z Z^T), with epsilon^2 = `precision`. It is
    largest if the vectors are spread evenly over min(N, D) directions.
    """
    unit = F.normalize(embeddings, dim=-1) * valid[:, None]
    pairs, width = unit.shape
    gram = unit @ unit.T if pairs <= width else unit.T @ unit  # the same determinant
    count = valid.sum().clamp(min=1)
    factor: torch.Tensor
    factor, _ = torch.linalg.cholesky_ex(torch.eye(len(gram), device=gram.device) + width / (count * precision) * gram)
    directions = count.clamp(max=width)
    largest = directions * torch.log1p(width / (directions * precision)) / 2
    return (largest - factor.diagonal().log().sum()) / count
