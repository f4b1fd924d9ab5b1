"""The configurations of regularizers against collapse."""

from typing import Annotated, Literal

from pydantic import Field

from data_prep.utils.config_file import Section


class RegularizerConfig(Section):
    """A regularizer and its weight."""

    name: str
    weight: float = Field(gt=0)
    """Weight of the regularizer in the loss."""


class VicregConfig(RegularizerConfig):
    """VICReg's variance and covariance terms (Bardes, Ponce and LeCun, arXiv 2105.04906, equations 1 to 4)."""

    name: Literal["vicreg"]
    """Penalty on standard deviations of components below 1, and on covariances of components."""
    covariance: float = Field(default=0.04, ge=0)
    """Weight of the covariance term relative to the variance term; the default is the paper's 1 / 25."""


class SigregConfig(RegularizerConfig):
    """SIGReg (Balestriero and LeCun, arXiv 2511.08544).

    It pushes embeddings towards a standard normal distribution along random directions.
    """

    name: Literal["sigreg"]
    """The Epps-Pulley statistic of random projections."""
    projections: int = Field(default=256, gt=0)
    """Number of random directions; they are drawn again in every micro step."""


class CodingRateConfig(RegularizerConfig):
    """The coding rate of unit embeddings (Ma et al., IEEE TPAMI 2007; Yu et al., arXiv 2006.08558, equation 1).

    It prevents collapse by enlarging the volume that the embeddings span, and needs no negatives.
    """

    name: Literal["coding_rate"]
    """Difference between the largest possible coding rate and the rate of the embeddings."""
    precision: float = Field(default=0.05, gt=0)
    """Squared distortion (epsilon^2) up to which embeddings count as equal."""


AnyRegularizerConfig = Annotated[SigregConfig | VicregConfig | CodingRateConfig, Field(discriminator="name")]
"""Any of the regularizers, selected by `name`."""
