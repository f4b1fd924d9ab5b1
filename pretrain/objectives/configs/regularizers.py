"""The configurations of regularizers against collapse."""

from typing import Literal

from pydantic import Field

from data_prep.config_file import Section


class RegularizerConfig(Section):
    """A regularizer and its weight."""

    name: str
    weight: float = Field(gt=0)
    """Weight of the regularizer in the loss."""


class VicregConfig(RegularizerConfig):
    """VICReg's variance and covariance terms (Bardes, Ponce and LeCun, arXiv 2105.04906, equations 1 to 4)."""

    name: Literal["vicreg"]
    """Pushes the standard deviation of each component to at least 1, and the covariances of components to 0."""
    covariance: float = Field(default=0.04, ge=0)
    """Weight of the covariance term relative to the variance term; the default is the paper's 1 / 25."""


class SigregConfig(RegularizerConfig):
    """SIGReg (Balestriero and LeCun, arXiv 2511.08544): embeddings that are standard normal along random directions."""

    name: Literal["sigreg"]
    """The Epps-Pulley statistic of random projections."""
    projections: int = Field(default=256, gt=0)
    """Number of random directions; they are drawn again in every micro step."""


class CodingRateConfig(RegularizerConfig):
    """The coding rate of unit embeddings (Ma et al., IEEE TPAMI 2007; Yu et al., arXiv 2006.08558, equation 1).

    It prevents collapse by the volume of the embeddings, without negatives.
    """

    name: Literal["coding_rate"]
    """Gap between the largest possible coding rate (volume) and the one of the embeddings."""
    precision: float = Field(default=0.05, gt=0)
    """Squared distortion (epsilon^2) up to which embeddings count as equal."""
