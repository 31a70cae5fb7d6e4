"""The steps of KD, LTKD and BiKD in plain PyTorch, as scripts of the field write them.

Eager, the teacher in every step, derivatives of derivatives by `create_graph`. There is no official code of LTKD: its
twin is written as the loss of DKD is in the common distillation zoo. Images are ready on the device: no augmentation.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from experiments.benchmark import pytorch_models

_KD, _HARD, _TEMPERATURE = 0.9, 0.1, 4.0


def device() -> torch.device:
    """Returns the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Waits until the device has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def kd(student, teacher, temperature=_TEMPERATURE):
    """Returns KD's loss per example, `[B]`, with the τ² factor."""
    log_q, p = (
        F.log_softmax(student / temperature, 1),
        F.softmax(teacher / temperature, 1),
    )
    return F.kl_div(log_q, p, reduction="none").sum(1) * temperature**2


def ltkd(student, teacher, groups, alpha=1.0, beta=1.0, temperature=_TEMPERATURE):
    """Returns LTKD's loss, the mean of a batch; `groups` holds each group's classes."""
    q, p = F.softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    student_mass = torch.stack([q[:, classes].sum(1) for classes in groups], 1)
    teacher_mass = torch.stack([p[:, classes].sum(1) for classes in groups], 1)
    sums = teacher_mass.sum(0)
    target = teacher_mass * (sums.mean() / sums)
    target = target / target.sum(1, keepdim=True)
    inter = F.kl_div(student_mass.log(), target, reduction="batchmean")
    intra = 0.0
    for classes in groups:
        log_within = F.log_softmax(student[:, classes] / temperature, 1)
        intra = intra + F.kl_div(
            log_within,
            F.softmax(teacher[:, classes] / temperature, 1),
            reduction="batchmean",
        )
    return temperature**2 * (alpha * inter + beta * intra)


def by_rank(num_classes):
    """Returns head, medium and tail of classes sorted by count."""
    ends = [0, round(0.33 * num_classes), round(0.67 * num_classes), num_classes]
    return [
        torch.arange(start, end, device=device()) for start, end in zip(ends, ends[1:])
    ]


def ltkd_alone(student, teacher):
    """Returns a call of LTKD's loss and its gradient, for logits in NumPy."""
    student, teacher = (torch.from_numpy(x).to(device()) for x in (student, teacher))
    student.requires_grad_()
    groups = by_rank(student.shape[1])

    def call():
        student.grad = None
        ltkd(student, teacher, groups).backward()
        wait()

    return call


class Step:
    """One step of a method's training: `step()` returns when it is done.

    Args:
      method: "kd", "ltkd" or "bikd".
      teacher, student: models of `pytorch_models`.
      batch_size: B, of training and of outer images.
      precision: "float32", "tf32" or "bfloat16" (by autocast).
    """

    def __init__(
        self,
        method,
        *,
        teacher,
        student,
        batch_size,
        precision="float32",
        num_classes=100,
        lr=0.1,
        update_every=5,
    ):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
            precision != "float32"
        )
        self._cast = precision == "bfloat16"
        self._lr = lr
        self._update_every = update_every
        self._count = 0
        self._teacher = pytorch_models.create(teacher, num_classes).to(device())
        self.student = (
            pytorch_models.create(student, num_classes, seed=1).to(device()).train()
        )
        self._optimizer = torch.optim.SGD(
            self.student.parameters(), lr, momentum=0.9, weight_decay=5e-4
        )
        self.weight_net = nn.Sequential(
            nn.Linear(2, 64),
            nn.Tanh(),
            nn.Linear(64, 64),
            nn.Tanh(),
            nn.Linear(64, 2),
            nn.Sigmoid(),
        ).to(device())
        self._weight_optimizer = torch.optim.Adam(
            self.weight_net.parameters(), 1e-3, weight_decay=1e-4
        )
        self._groups = by_rank(num_classes)
        self._batch, self._outer_batch = (
            self._noise(batch_size, num_classes) for _ in range(2)
        )
        self._step = {"kd": self._kd, "ltkd": self._ltkd, "bikd": self._bikd}[method]

    def __call__(self):
        with (
            torch.autocast(device().type, torch.bfloat16)
            if self._cast
            else contextlib.nullcontext()
        ):
            self._step()
        wait()

    def _noise(self, batch_size, num_classes):
        images = torch.randn(batch_size, 3, 32, 32, device=device())
        return images, torch.randint(num_classes, (batch_size,), device=device())

    def _teacher_logits(self, images):
        with torch.no_grad():
            return self._teacher(images).float()

    def _update(self, loss):
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()

    def _kd(self):
        images, labels = self._batch
        logits, teacher = self.student(images).float(), self._teacher_logits(images)
        self._update(
            _HARD * F.cross_entropy(logits, labels) + _KD * kd(logits, teacher).mean()
        )

    def _ltkd(self):
        images, labels = self._batch
        logits, teacher = self.student(images).float(), self._teacher_logits(images)
        self._update(
            F.cross_entropy(logits, labels) + ltkd(logits, teacher, self._groups)
        )

    def _terms(self, logits, teacher, labels):
        """Hard and soft loss of each example, and their weights."""
        hard, soft = (
            F.cross_entropy(logits, labels, reduction="none"),
            kd(logits, teacher),
        )
        features = torch.stack(
            [hard, F.cross_entropy(teacher, labels, reduction="none")], 1
        ).detach()
        return torch.stack([hard, soft], 1), self.weight_net(features).float()

    def _bikd(self):
        images, labels = self._batch
        outer_images, outer_labels = self._outer_batch
        teacher = self._teacher_logits(images)
        self._teacher_logits(
            outer_images
        )  # the official script runs it on both batches, whatever the outer loss
        params = dict(self.student.named_parameters())
        # Running statistics are those of the real step alone.
        buffers = {
            name: buffer.clone() for name, buffer in self.student.named_buffers()
        }
        forward = torch.func.functional_call
        terms, weights = self._terms(
            forward(self.student, (params, buffers), images).float(), teacher, labels
        )
        gradient = torch.autograd.grad(
            (weights * terms).sum(1).mean(), tuple(params.values()), create_graph=True
        )
        virtual = {
            name: value - self._lr * g
            for (name, value), g in zip(params.items(), gradient)
        }
        outer_loss = F.cross_entropy(
            forward(self.student, (virtual, buffers), outer_images).float(),
            outer_labels,
        )
        (outer_loss / self._update_every).backward(
            inputs=list(self.weight_net.parameters())
        )
        self._count += 1
        if self._count % self._update_every == 0:
            self._weight_optimizer.step()
            self._weight_optimizer.zero_grad()
        terms, weights = self._terms(self.student(images).float(), teacher, labels)
        self._update((weights.detach() * terms).sum(1).mean())
