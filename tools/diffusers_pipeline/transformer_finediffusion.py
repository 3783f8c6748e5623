"""The DiT of an exported folder, with the config and the files of a diffusers model."""

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from models import DiT


class FineDiffusionTransformer(DiT, ModelMixin, ConfigMixin):
    """`DiT` itself, its parameters' names and `forward(x, t, y)` too.

    What it adds to the config, keys as strings: `id2label` {label: class name}, `label2superclass` {label: index of its
    superclass} and `id2superclass` {index: superclass name}.
    """

    _no_split_modules = ["DiTBlock"]
    _keep_in_fp32_modules = ["norm1", "norm2", "norm_final", "pos_embed"]  # where the rest is loaded in half precision

    @register_to_config
    def __init__(
        self,
        input_size,
        patch_size,
        in_channels,
        hidden_size,
        depth,
        num_heads,
        id2label,
        label2superclass,
        id2superclass,
        null_row=False,
    ):
        super().__init__(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            num_classes=len(id2label),
            num_super_classes=len(id2superclass),
            parents=[label2superclass[str(label)] for label in range(len(id2label))],
            null_row=null_row,
        )
