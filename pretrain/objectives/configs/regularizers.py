"""The configurations of regularizers against collapse."""

from typing import Literal

from pydantic import Field

from data_prep.config_file import Section


class RegularizerConfig(Section):
    """A regularizer and its weight."""

    name: str
    weight: float = Field(gt=0)
    """Its weight in the loss."""


class VicregConfig(RegularizerConfig):
    """VICReg's variance and covariance terms (Bardes, Ponce and LeCun, arXiv 2105.04906, equations 1 to 4)."""

    name: Literal["vicreg"]
    """Standard deviations of at least 1, and no correlation between components."""
    covariance: float = Field(default=0.04, ge=0)
    """Weight of the covariance term against the variance term; the paper's 1 / 25."""


class SigregConfig(RegularizerConfig):
    """SIGReg (Balestriero and LeCun, arXiv 2511.08544): embeddings like a standard normal distribution, seen along random directions."""

    name: Literal["sigreg"]
    """The Epps-Pulley statistic of random projections."""
    projections: int = Field(default=256, gt=0)
    """Random directions, drawn anew in every micro step."""


class CodingRateConfig(RegularizerConfig):
    """The coding rate of unit embeddings (Ma et al., IEEE TPAMI 2007; Yu et al., arXiv 2006.08558, equation 1): volume instead of negatives."""

    name: Literal["coding_rate"]
    """How far the volume that the embeddings span is below the largest possible."""
    precision: float = Field(default=0.05, gt=0)
    """epsilon^2, the squared distortion up to which embeddings count as equal."""
