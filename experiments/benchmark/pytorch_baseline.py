"""The training steps of cross-entropy, KD, LTKD and BiKD in PyTorch.

They are written as scripts of the field are: eager, with the teacher in every step, and
with derivatives of derivatives by `create_graph`. There is no official code of LTKD;
its loss is written in the form in which the common distillation zoo has DKD. Images are
on the device already, without augmentation.

A tuned step is what a careful user adds to such a script: images and kernels with the
channels last, and compiled networks. BiKD's networks stay eager, since PyTorch does not
differentiate a compiled one twice.
"""

import contextlib
import time

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from torch import nn

from experiments.benchmark import pytorch_models

_KD_WEIGHT = 0.9
_CE_WEIGHT = 0.1
_TEMPERATURE = 4.0
_NUM_CLASSES = 100
# Of the student, and of BiKD's virtual step.
_LEARNING_RATE = 0.1


def device() -> torch.device:
    """Returns the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Waits until the device has done its work, which PyTorch only queues on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# Losses.


def kd(student, teacher):
    """Returns KD's loss per example, `[B]`, with the factor τ²."""
    log_q = F.log_softmax(student / _TEMPERATURE, 1)
    p = F.softmax(teacher / _TEMPERATURE, 1)
    return F.kl_div(log_q, p, reduction="none").sum(1) * _TEMPERATURE**2


def ltkd(student, teacher, groups):
    """Returns LTKD's loss with α = β = 1, the mean of a batch.

    Args:
      student: logits `[B, C]`.
      teacher: logits `[B, C]`.
      groups: indices of the classes of each group.
    """
    q = F.softmax(student / _TEMPERATURE, 1)
    p = F.softmax(teacher / _TEMPERATURE, 1)
    student_mass = torch.stack([q[:, classes].sum(1) for classes in groups], 1)
    teacher_mass = torch.stack([p[:, classes].sum(1) for classes in groups], 1)
    # The teacher's mass is rebalanced, so that all groups have the same batch sum.
    batch_sums = teacher_mass.sum(0)
    target = teacher_mass * (batch_sums.mean() / batch_sums)
    target = target / target.sum(1, keepdim=True)
    inter = F.kl_div(student_mass.log(), target, reduction="batchmean")
    intra = 0.0
    for classes in groups:
        log_q_within = F.log_softmax(student[:, classes] / _TEMPERATURE, 1)
        p_within = F.softmax(teacher[:, classes] / _TEMPERATURE, 1)
        intra = intra + F.kl_div(log_q_within, p_within, reduction="batchmean")
    return _TEMPERATURE**2 * (inter + intra)


def by_rank(num_classes):
    """Returns the indices of head, medium and tail, of classes sorted by count."""
    ends = [0, round(0.33 * num_classes), round(0.67 * num_classes), num_classes]
    return [
        torch.arange(start, end, device=device()) for start, end in zip(ends, ends[1:])
    ]


def ltkd_call(student, teacher):
    """Returns a call of LTKD's loss and its gradient, for logits in NumPy."""
    student = torch.from_numpy(student).to(device()).requires_grad_()
    teacher = torch.from_numpy(teacher).to(device())
    groups = by_rank(student.shape[1])

    def call():
        student.grad = None
        ltkd(student, teacher, groups).backward()
        wait()

    return call


# Steps.


class Step:
    """Trains a student by one step in each call, which does not wait for the device.

    Args:
      method: "ce", "kd", "ltkd" or "bikd".
      teacher: name of a model of `pytorch_models`.
      student: name of a model of `pytorch_models`.
      batch_size: B, of training images and of outer images.
      precision: "float32", "tf32" or "bfloat16" (by autocast).
      update_every: k, after how many steps BiKD's weight net is updated.
      tuned: whether channels are last and the networks compiled, see above.
    """

    def __init__(
        self,
        method,
        *,
        teacher,
        student,
        batch_size,
        precision="float32",
        update_every=5,
        tuned=False,
    ):
        # These settings are of the whole process; an earlier step may have set them.
        allow_tf32 = precision != "float32"
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
        torch.backends.cudnn.allow_tf32 = allow_tf32
        self._use_autocast = precision == "bfloat16"
        self._update_every = update_every
        self._num_steps = 0
        self._memory_format = torch.contiguous_format
        if tuned:
            self._memory_format = torch.channels_last
        self._teacher = self._on_device(pytorch_models.create(teacher, _NUM_CLASSES))
        student = pytorch_models.create(student, _NUM_CLASSES, seed=1)
        self.student = self._on_device(student).train()
        self._optimizer = torch.optim.SGD(
            self.student.parameters(), _LEARNING_RATE, momentum=0.9, weight_decay=5e-4
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
        self._groups = by_rank(_NUM_CLASSES)
        self._batch = self._random_batch(batch_size)
        self._outer_batch = self._random_batch(batch_size)
        step_fns = {
            "ce": self._ce,
            "kd": self._kd,
            "ltkd": self._ltkd,
            "bikd": self._bikd,
        }
        self._step = step_fns[method]
        if tuned and method != "bikd":
            # In place, so that parameters keep their names.
            self.student.compile()
            self._teacher.compile()

    def __call__(self):
        """Makes one step."""
        context = contextlib.nullcontext()
        if self._use_autocast:
            context = torch.autocast(device().type, torch.bfloat16)
        with context:
            self._step()

    def seconds(self, steps):
        """Returns the mean seconds of a step."""
        start = time.perf_counter()
        for _ in range(steps):
            self()
        wait()
        return (time.perf_counter() - start) / steps

    def _on_device(self, network):
        return network.to(device(), memory_format=self._memory_format)

    def _random_batch(self, batch_size):
        images = torch.randn(batch_size, 3, 32, 32, device=device())
        images = images.contiguous(memory_format=self._memory_format)
        return images, torch.randint(_NUM_CLASSES, (batch_size,), device=device())

    def _teacher_logits(self, images):
        with torch.no_grad():
            return self._teacher(images).float()

    def _update(self, loss):
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()

    def _ce(self):
        images, labels = self._batch
        # Losses are in float32, also under autocast.
        self._update(F.cross_entropy(self.student(images).float(), labels))

    def _kd(self):
        images, labels = self._batch
        logits = self.student(images).float()
        teacher = self._teacher_logits(images)
        ce = F.cross_entropy(logits, labels)
        self._update(_CE_WEIGHT * ce + _KD_WEIGHT * kd(logits, teacher).mean())

    def _ltkd(self):
        images, labels = self._batch
        logits = self.student(images).float()
        teacher = self._teacher_logits(images)
        ce = F.cross_entropy(logits, labels)
        self._update(ce + ltkd(logits, teacher, self._groups))

    def _terms_and_weights(self, logits, teacher, labels):
        """Returns the two loss terms of each example and their weights, both `[B, 2]`.

        The weight net's features are the losses of the student and of the teacher.
        """
        student_ce = F.cross_entropy(logits, labels, reduction="none")
        teacher_ce = F.cross_entropy(teacher, labels, reduction="none")
        features = torch.stack([student_ce, teacher_ce], 1).detach()
        terms = torch.stack([student_ce, kd(logits, teacher)], 1)
        return terms, self.weight_net(features).float()

    def _bikd(self):
        images, labels = self._batch
        teacher = self._teacher_logits(images)
        # The official script runs the teacher on both batches, whatever the outer loss.
        self._teacher_logits(self._outer_batch[0])
        outer_loss = self._outer_loss_after_virtual_step(teacher)
        # The sum of k gradients divided by k is their mean.
        (outer_loss / self._update_every).backward(
            inputs=list(self.weight_net.parameters())
        )
        self._num_steps += 1
        if self._num_steps % self._update_every == 0:
            self._weight_optimizer.step()
            self._weight_optimizer.zero_grad()
        logits = self.student(images).float()
        terms, weights = self._terms_and_weights(logits, teacher, labels)
        self._update((weights.detach() * terms).sum(1).mean())

    def _outer_loss_after_virtual_step(self, teacher):
        """Returns the loss on the outer batch as a function of the weight net."""
        images, labels = self._batch
        outer_images, outer_labels = self._outer_batch
        params = dict(self.student.named_parameters())
        # Only the real step changes the running statistics, so this one has copies.
        buffers = {}
        for name, buffer in self.student.named_buffers():
            buffers[name] = buffer.clone()

        def forward(params, images):
            return torch.func.functional_call(
                self.student, (params, buffers), images
            ).float()

        terms, weights = self._terms_and_weights(
            forward(params, images), teacher, labels
        )
        inner_loss = (weights * terms).sum(1).mean()
        gradient = torch.autograd.grad(
            inner_loss, tuple(params.values()), create_graph=True
        )
        virtual_params = {}
        for (name, param), param_gradient in zip(params.items(), gradient):
            virtual_params[name] = param - _LEARNING_RATE * param_gradient
        return F.cross_entropy(forward(virtual_params, outer_images), outer_labels)
