"""The CIFAR ResNet and the WRN in PyTorch, with the zoo's names in their state dicts.

The benchmark's twin, and a truth for the converter. Written from the papers' figures and those names alone, on purpose
in another form than `ltkd_jax.models`.
"""

import torch
from torch import nn


def _conv(inputs, outputs, size, stride=1):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class _Basic(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = (
            _conv(inputs, outputs, 3, stride),
            nn.BatchNorm2d(outputs),
        )
        self.conv2, self.bn2 = _conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        if inputs != outputs or stride > 1:
            self.downsample = nn.Sequential(
                _conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )
        else:
            self.downsample = nn.Identity()

    def forward(self, x):
        branch = nn.Sequential(self.conv1, self.bn1, nn.ReLU(), self.conv2, self.bn2)
        return torch.relu(branch(x) + self.downsample(x))


class _PreActivation(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), _conv(outputs, outputs, 3)
        self.convShortcut = (
            None if inputs == outputs else _conv(inputs, outputs, 1, stride)
        )

    def forward(self, x):
        start = torch.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(start)
        return shortcut + self.conv2(torch.relu(self.bn2(self.conv1(start))))


def _stages(block, widths, blocks):
    """Three stages; the second and third halve the image in their first block."""
    for stage in range(3):
        first = block(widths[stage], widths[stage + 1], 1 if stage == 0 else 2)
        yield nn.Sequential(
            first,
            *(
                block(widths[stage + 1], widths[stage + 1], 1)
                for _ in range(blocks - 1)
            ),
        )


class ResNet(nn.Module):
    def __init__(self, depth, widths, num_classes):
        super().__init__()
        self.conv1, self.bn1 = _conv(3, widths[0], 3), nn.BatchNorm2d(widths[0])
        self.layer1, self.layer2, self.layer3 = _stages(
            _Basic, widths, (depth - 2) // 6
        )
        self.fc = nn.Linear(widths[3], num_classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class WideResNet(nn.Module):
    def __init__(self, depth, widening, num_classes):
        super().__init__()
        widths = (16, 16 * widening, 32 * widening, 64 * widening)
        self.conv1 = _conv(3, 16, 3)
        stages = _stages(_PreActivation, widths, (depth - 4) // 6)
        # The zoo's checkpoints have a level of names between a stage and its blocks.
        self.block1, self.block2, self.block3 = (
            nn.ModuleDict({"layer": stage}) for stage in stages
        )
        self.bn1, self.fc = nn.BatchNorm2d(widths[3]), nn.Linear(widths[3], num_classes)

    def forward(self, x):
        x = self.conv1(x)
        for block in (self.block1, self.block2, self.block3):
            x = block["layer"](x)
        return self.fc(torch.relu(self.bn1(x)).mean((2, 3)))


def create(name, num_classes, seed=0):
    """Returns a model in evaluation mode whose weights and running statistics are random."""
    torch.manual_seed(seed)
    if name.startswith("wrn_"):
        _, depth, widening = name.split("_")
        model = WideResNet(int(depth), int(widening), num_classes)
    else:
        depth, _, wide = name.removeprefix("resnet").partition("x")
        model = ResNet(
            int(depth), (32, 64, 128, 256) if wide else (16, 16, 32, 64), num_classes
        )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
            ):
                nn.init.uniform_(tensor, low, high)
    return model.eval()
