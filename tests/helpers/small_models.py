"""Names of small models for tests."""

# One of every class, and of every form of a class.
_CIFAR = (
    "resnet8",
    "wrn_16_1",
    "vgg8",
    "mobilenetv2",
    "shufflenetv1",
    "shufflenetv2",
    "resnet18",
)
SMALL_MODELS = (*_CIFAR, "resnet18_imagenet", "resnet50_imagenet")
