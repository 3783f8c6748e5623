"""The DiT of an exported folder as a diffusers model, with a config."""

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from models import DiT


class FineDiffusionTransformer(DiT, ModelMixin, ConfigMixin):
    """A `DiT` with the same parameter names and the same `forward(x, t, y)`.

    Its config also has, with keys as strings, `id2label` {label: class name}, `label2superclass` {label: index of the
    superclass} and `id2superclass` {index: superclass name}. `ranks` {rank: [name of each class's node]} are the further
    ranks with rows, from coarse to fine; with `path` a label is the sum of its row and those of its ancestors.
    """

    _no_split_modules = ["DiTBlock"]
    _keep_in_fp32_modules = ["norm1", "norm2", "norm_final", "pos_embed"]  # if the rest is loaded in half precision

    @register_to_config
    def __init__(
        self,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        id2label: dict[str, str],
        label2superclass: dict[str, int],
        id2superclass: dict[str, str],
        null_row: bool = False,
        ranks: dict[str, list[str]] | None = None,
        path: bool = False,
    ):
        parents, sizes = [[label2superclass[str(label)] for label in range(len(id2label))]], []
        for names in (ranks or {}).values():
            nodes = {name: node for node, name in enumerate(dict.fromkeys(names))}
            parents.append([nodes[name] for name in names])
            sizes.append(len(nodes))
        super().__init__(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            num_classes=len(id2label),
            num_super_classes=len(id2superclass),
            parents=parents,
            null_row=null_row,
            ranks=sizes,
            path=path,
        )
