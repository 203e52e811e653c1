"""Logit distillation: KD, DKD and AEKT behind one interface. Knows logits, no network and no data.

DKD is a reproduction of its authors' library (mdistiller, Zhao et al. 2022), KD is Hinton et al. 2015 as
that library has it. AEKT is inspired by arXiv 2409.01679: that explicit knowledge is weighed by the ratio of
teacher to student, and that a serial layer parts the tasks, is the paper's; the forms A, B and C of the loss,
the clamp and the place of the layer are reconstructions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LOSSES = ("ce", "kd", "dkd", "aekt")
FORMS = ("ratio", "log_ratio", "weighted")  # A, B and C of the reconstruction


@dataclass(frozen=True, slots=True)
class Confidence:
    """One side's softmax, split at the target class: log p_t, log (1 - p_t) and log phat.

    target, rest (N,); others (N, C - 1), the classes but the target, renormalised. All of them logarithms,
    and finite for any finite logits: 1 - p_t is a sum over the other classes, never a difference.
    """

    target: Tensor
    rest: Tensor
    others: Tensor

    @classmethod
    def of(cls, logits: Tensor, target: Tensor, temperature: float) -> "Confidence":
        """Logits (N, C), target int64 (N,)."""
        count, classes = logits.shape
        logs = (logits / temperature).log_softmax(1)
        asked = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, target[:, None], True)
        remaining = logs[~asked].view(count, classes - 1)
        return cls(logs[asked], remaining.logsumexp(1), remaining.log_softmax(1))


def tckd(student: Confidence, teacher: Confidence) -> Tensor:
    """KL(b^T || b^S) of target against the rest, (N,). DKD (Zhao et al. 2022), eq. 7, first term.

    Gradient in the student's logits over the temperature: p_t^S - p_t^T at the target, and
    (p_t^T - p_t^S) phat_i^S elsewhere.
    """
    hit = teacher.target.exp() * (teacher.target - student.target)
    return hit + teacher.rest.exp() * (teacher.rest - student.rest)


def nckd(student: Confidence, teacher: Confidence) -> Tensor:
    """KL(phat^T || phat^S) among the other classes, (N,). DKD, eq. 7, second term without its factor.

    Gradient in the student's logits over the temperature: 0 at the target, phat_i^S - phat_i^T elsewhere.
    mdistiller subtracts 1000 from the target's logit; here the class is left out, which is exact.
    """
    return (teacher.others.exp() * (teacher.others - student.others)).sum(1)


def kd(student: Confidence, teacher: Confidence) -> Tensor:
    """KL(p^T || p^S), (N,), as TCKD + (1 - p_t^T) NCKD: DKD's identity, eq. 6."""
    return tckd(student, teacher) + teacher.rest.exp() * nckd(student, teacher)


def explicit(student: Confidence, teacher: Confidence, form: str, ratio_limit: float) -> Tensor:
    """AEKT's loss of explicit knowledge L_e, (N,), with r = p_t^T / p_t^S in log space. Reconstruction.

    `ratio` (A) is r, gradient r (p^S - onehot_t): it never rests. `log_ratio` (B) is (log r)^2 / 2, gradient
    log(r) (p^S - onehot_t): zero exactly where the confidences agree. `weighted` (C) is stopgrad(r) TCKD.

    r is clamped to [1 / ratio_limit, ratio_limit] as the factor of the gradient, not as the value: outside,
    A and B go on as straight lines in log r. A clamped value would have no gradient where the student is
    furthest from its teacher.
    """
    log_ratio, bound = teacher.target - student.target, math.log(ratio_limit)
    if form == "log_ratio":
        zero = torch.zeros_like(log_ratio)
        return nn.functional.huber_loss(log_ratio, zero, reduction="none", delta=bound)
    held = log_ratio.clamp(-bound, bound).detach()
    if form == "ratio":
        return held.exp() * (1 + log_ratio - held)
    return held.exp() * tckd(student, teacher)


@dataclass(frozen=True, slots=True)
class Distillation:
    """Which loss, and its weights; the defaults are mdistiller's for DKD on CIFAR-100, and AEKT takes them
    over.

    ce: CE alone. kd: `ce_weight` CE + `kd_weight` tau^2 KL. dkd: `ce_weight` CE + w tau^2 (alpha TCKD + beta
    NCKD). aekt: `ce_weight` CE + w tau^2 (alpha L_e + beta NCKD). w = min(epoch / `warmup_epochs`, 1).
    mdistiller's own weights of KD are 0.1 and 0.9: `Distillation.of("kd")`. Raises ValueError for what is
    out of range.
    """

    loss: str = "aekt"
    form: str = "log_ratio"
    temperature: float = 4.0
    ce_weight: float = 1.0
    kd_weight: float = 0.9
    alpha: float = 1.0
    beta: float = 8.0
    warmup_epochs: float = 20.0
    ratio_limit: float = 10.0

    def __post_init__(self) -> None:
        for name, value, allowed in (("loss", self.loss, LOSSES), ("form", self.form, FORMS)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}; got {value!r}")
        for name, ok in (
            ("temperature", 0 < self.temperature < math.inf),
            ("ce_weight", 0 <= self.ce_weight < math.inf),
            ("kd_weight", 0 <= self.kd_weight < math.inf),
            ("alpha", 0 <= self.alpha < math.inf),
            ("beta", 0 <= self.beta < math.inf),
            ("warmup_epochs", 0 <= self.warmup_epochs < math.inf),
            ("ratio_limit", 1 < self.ratio_limit < math.inf),
        ):
            if not ok:
                raise ValueError(f"{name} is out of range; got {getattr(self, name)!r}")

    @classmethod
    def of(cls, loss: str) -> "Distillation":
        """A loss with its authors' weights."""
        return cls(loss, ce_weight=0.1 if loss == "kd" else 1.0)

    def warmth(self, epoch: float) -> float:
        """The factor w at an epoch, which may be a part of one. KD is not warmed up."""
        return min(epoch / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0

    def losses(
        self, classified: Tensor, distilled: Tensor, teacher: Tensor, target: Tensor, *, epoch: float
    ) -> dict[str, Tensor]:
        """Scalars by name, means over the batch: `loss` and its unweighted parts.

        classified, distilled (N, C): the student's logits that get the cross-entropy and those that get the
        rest (the same tensor without a serial layer); teacher (N, C) logits; target int64 (N,). With two
        classes there is one other class and NCKD is 0. Raises ValueError for fewer.
        """
        if teacher.shape[1] < 2:
            raise ValueError(f"distillation needs at least 2 classes; got {teacher.shape[1]}")
        ce = nn.functional.cross_entropy(classified, target)
        found = {"loss": self.ce_weight * ce, "ce": ce}
        if self.loss == "ce":
            return found
        theirs = Confidence.of(teacher.detach(), target, self.temperature)
        ours = Confidence.of(distilled, target, self.temperature)
        square = self.temperature**2
        if self.loss == "kd":
            found["kd"] = kd(ours, theirs).mean()
            found["loss"] = found["loss"] + self.kd_weight * square * found["kd"]
            return found
        if self.loss == "dkd":
            first = found["tckd"] = tckd(ours, theirs).mean()
        else:
            first = found["explicit"] = explicit(ours, theirs, self.form, self.ratio_limit).mean()
        second = found["nckd"] = nckd(ours, theirs).mean()
        told = self.alpha * first + self.beta * second
        found["loss"] = found["loss"] + self.warmth(epoch) * square * told
        return found


class SerialLayer(nn.Module):
    """FC2 of AEKT's task serialization: C x C, the identity at the start, between the tasks. Reconstruction.

    The classifier's logits get the cross-entropy, those behind FC2 the distillation; `swap` turns that round,
    since the paper's summary does not say which comes first. Without swap FC2 is dropped after training; with
    swap it belongs to the classifier and `fold` merges it, so that neither costs anything at inference.
    """

    def __init__(self, classes: int, *, swap: bool = False) -> None:
        super().__init__()
        self.swap = swap
        self.fc2 = nn.Linear(classes, classes)
        self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        nn.init.eye_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of FC1 (N, C) -> those for the cross-entropy and those for the distillation, (N, C) each."""
        behind = self.fc2(logits)
        return (behind, logits) if self.swap else (logits, behind)

    @torch.no_grad()
    def fold(self, fc1: nn.Linear) -> None:
        """Make FC1 alone answer what gets the cross-entropy, once training is over; FC2 becomes the
        identity.
        """
        if self.swap:
            fc1.bias.copy_(self.fc2(fc1.bias))
            fc1.weight.copy_(self.fc2.weight @ fc1.weight)
        self._reset()
