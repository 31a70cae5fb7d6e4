"""Names of small models for tests."""

# One of each class, and of each form of a class.
SMALL_MODELS = (
    "resnet8",
    "wrn_16_1",
    "vgg8",
    "mobilenetv2",
    "shufflenetv1",
    "shufflenetv2",
    "resnet18",
    "resnet18_imagenet",
    "resnet50_imagenet",
)
