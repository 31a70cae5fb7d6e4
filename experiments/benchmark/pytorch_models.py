"""ResNets and the WRN in PyTorch, with the published names in their state dicts.

These are those of the CIFAR distillation zoo, and torchvision's for ImageNet. They are
the models of the PyTorch benchmark, and a reference for the converter. To be an
independent reference, they are written from the papers' figures and the published names
alone, in another form than `ltkd_jax.models`.
"""

import collections

import torch
from torch import nn


def _conv(inputs, outputs, size, stride=1):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class _Basic(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if inputs != outputs or stride > 1:
            self.downsample = nn.Sequential(
                _conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class _Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1 = _conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, 4 * width, 1)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample: nn.Module = nn.Identity()
        if inputs != 4 * width or stride > 1:
            self.downsample = nn.Sequential(
                _conv(inputs, 4 * width, 1, stride), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class _PreActivation(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs, 3)
        # The zoo's name, as all names of layers.
        if inputs != outputs:
            self.convShortcut = _conv(inputs, outputs, 1, stride)
        else:
            self.convShortcut = None

    def forward(self, x):
        activated = torch.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return shortcut + self.conv2(torch.relu(self.bn2(self.conv1(activated))))


def _stages(block, widths, num_blocks):
    """Yields three stages, of which the second and third halve the image."""
    for stage in range(3):
        inputs, outputs = widths[stage : stage + 2]
        blocks = [block(inputs, outputs, 1 if stage == 0 else 2)]
        for _ in range(num_blocks - 1):
            blocks.append(block(outputs, outputs, 1))
        yield nn.Sequential(*blocks)


class ResNet(nn.Module):
    """Computes logits by a CIFAR ResNet.

    Args:
      depth: number of layers, 6 n + 2.
      widths: channels of the first layer and of the three stages.
      num_classes: C.
    """

    def __init__(self, depth, widths, num_classes):
        super().__init__()
        self.conv1 = _conv(3, widths[0], 3)
        self.bn1 = nn.BatchNorm2d(widths[0])
        num_blocks = (depth - 2) // 6
        self.layer1, self.layer2, self.layer3 = _stages(_Basic, widths, num_blocks)
        self.fc = nn.Linear(widths[3], num_classes)

    def forward(self, x):
        """Returns logits `[B, C]` of images `[B, 3, H, W]`."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class WideResNet(nn.Module):
    """Computes logits by a wide ResNet.

    Args:
      depth: number of layers, 6 n + 4.
      widening: factor of the channels.
      num_classes: C.
    """

    def __init__(self, depth, widening, num_classes):
        super().__init__()
        widths = (16, 16 * widening, 32 * widening, 64 * widening)
        self.conv1 = _conv(3, 16, 3)
        stages = _stages(_PreActivation, widths, (depth - 4) // 6)
        # The zoo's checkpoints have a level of names between a stage and its blocks.
        self.block1, self.block2, self.block3 = (
            nn.ModuleDict({"layer": stage}) for stage in stages
        )
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)

    def forward(self, x):
        """Returns logits `[B, C]` of images `[B, 3, H, W]`."""
        x = self.conv1(x)
        for block in (self.block1, self.block2, self.block3):
            x = block["layer"](x)
        return self.fc(torch.relu(self.bn1(x)).mean((2, 3)))


class ImageNetResNet(nn.Sequential):
    """Computes logits by a ResNet for ImageNet.

    Args:
      depth: 18, 34 or 50; 50 has bottlenecks.
      num_classes: C.
    """

    def __init__(self, depth, num_classes):
        num_blocks = (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3)
        block, expansion = (_Bottleneck, 4) if depth == 50 else (_Basic, 1)
        layers = {
            "conv1": _conv(3, 64, 7, 2),
            "bn1": nn.BatchNorm2d(64),
            "relu": nn.ReLU(),
            "maxpool": nn.MaxPool2d(3, 2, padding=1),
        }
        inputs = 64
        for stage, number in enumerate(num_blocks):
            width = 64 * 2**stage
            outputs = expansion * width
            blocks = [block(inputs, width, 1 if stage == 0 else 2)]
            blocks += [block(outputs, width, 1) for _ in range(number - 1)]
            layers[f"layer{stage + 1}"] = nn.Sequential(*blocks)
            inputs = outputs
        layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(inputs, num_classes)
        super().__init__(collections.OrderedDict(layers))


def create(name, num_classes, seed=0):
    """Returns a model in evaluation mode.

    Its weights and running statistics are random, so that a test sees each of them.
    """
    torch.manual_seed(seed)
    if name.startswith("wrn_"):
        _, depth, widening = name.split("_")
        model: nn.Module = WideResNet(int(depth), int(widening), num_classes)
    elif name.endswith("_imagenet"):
        depth = name.removeprefix("resnet").removesuffix("_imagenet")
        model = ImageNetResNet(int(depth), num_classes)
    else:
        depth, _, times_four = name.removeprefix("resnet").partition("x")
        widths = (32, 64, 128, 256) if times_four else (16, 16, 32, 64)
        model = ResNet(int(depth), widths, num_classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()
