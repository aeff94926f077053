"""Losses on preference pairs: DPO and its relatives, and Bradley-Terry; one loss per pair, the caller averages."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, relu


def sigmoid_loss(margins: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """The DPO loss, -log sigmoid(margin).

    Args:
        margins: Implicit reward of the chosen minus that of the rejected completion, beta included.

    References:
        Rafailov et al. 2023, eq. 7, https://arxiv.org/abs/2305.18290
    """
    return -logsigmoid(margins)


def conservative_loss(margins: Float[Tensor, " pair"], *, label_smoothing: float) -> Float[Tensor, " pair"]:
    """The cDPO loss: the labels are taken to be swapped with probability ``label_smoothing``.

    References:
        Mitchell 2023, eq. 3, https://ericmitchell.ai/cdpo.pdf
    """
    return -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)


def robust_loss(margins: Float[Tensor, " pair"], *, label_smoothing: float) -> Float[Tensor, " pair"]:
    """The robust DPO loss: unbiased for the clean loss when labels are swapped with probability ``label_smoothing``.

    References:
        Chowdhury et al. 2024, eq. 12, https://arxiv.org/abs/2403.00409
    """
    kept = (1 - label_smoothing) * logsigmoid(margins)
    swapped = label_smoothing * logsigmoid(-margins)
    return -(kept - swapped) / (1 - 2 * label_smoothing)


def hinge_loss(margins: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """The SLiC hinge loss, max(0, 1 - margin).

    References:
        Zhao et al. 2023, https://arxiv.org/abs/2305.10425
    """
    return relu(1 - margins)


def ipo_loss(log_ratio_differences: Float[Tensor, " pair"], *, beta: float) -> Float[Tensor, " pair"]:
    """The IPO loss, (h - 1 / (2 beta))^2.

    Args:
        log_ratio_differences: h, the chosen log-ratio minus the rejected one *without* beta, in nats.
        beta: The regularisation strength (tau in the paper).

    References:
        Azar et al. 2023, eq. 17, https://arxiv.org/abs/2310.12036
    """
    return (log_ratio_differences - 1 / (2 * beta)) ** 2


def bradley_terry_loss(
    chosen_scores: Float[Tensor, " pair"], rejected_scores: Float[Tensor, " pair"]
) -> Float[Tensor, " pair"]:
    """Negative log-likelihood of the chosen completion winning, -log sigmoid(chosen - rejected).

    References:
        Ouyang et al. 2022, eq. 1, https://arxiv.org/abs/2203.02155
    """
    return -logsigmoid(chosen_scores - rejected_scores)


def accuracy(margins: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """1 where the chosen completion is ahead, 0.5 where neither is, 0 where it is behind."""
    return 0.5 + 0.5 * margins.sign()
