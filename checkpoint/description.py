"""What an adapter or a training state says about its model: one schema, read and written as JSON."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

from finetune import LORA_LAYERS, METHODS
from hierarchy import Hierarchy
from models import DiT_models

ADAPTER, STATE = "finediffusion-adapter-1", "finediffusion-training-state-1"
EMBEDDERS = "tiered", "path", "null"
MOST_PIXELS, MOST_CHANNELS, MOST_RANK = 1 << 14, 1 << 10, 1 << 13


@dataclass(frozen=True)
class Base:
    """The file of weights that an adapter was trained on.

    path    where it was when the training began
    sha256  hex digest of the file
    """

    path: str
    sha256: str


def checked(kind: type, check: Callable[[object], bool] = lambda value: True, **options):
    """Return a field that every file must have, of exactly this type and passing the check."""
    return field(metadata={"type": kind, "check": check}, **options)


def of_state(kind: type, check: Callable[[object], bool] = lambda value: True, **options):
    """Return a field that every training state must have."""
    return field(metadata={"type": kind, "check": check, "format": STATE}, **options)


def optional(kind: type, check: Callable[[object], bool] = lambda value: True):
    """Return a field that a file may have, of exactly this type and passing the check, and None otherwise."""
    return field(default=None, metadata={"type": kind, "check": check, "optional": True})


def unwritten(**options):
    """Return a field that is set while a file is read, and not written."""
    return field(default=None, compare=False, metadata={"written": False}, **options)


@dataclass(frozen=True)
class ModelDescription:
    """A model and where it came from.

    model        a preset of models.DiT_models
    image_size   pixels per side
    latent_size  side of the latents that the model sees; image_size without an autoencoder
    channels     channels of the latents; 3 without an autoencoder
    vae          --vae: ema, mse, a local folder, or none
    method       a name in finetune.METHODS
    embedder     "tiered" (a row per class and superclass), "path" (the same table, a label is the sum of its row and its
                 ancestors') or "null" (a row per class and a null row, as in DiT)
    hierarchy    classes, superclasses and further ranks, which all have rows in a tiered table
    null_row     whether a tiered table ends with a null row
    base         the weights that the trained parameters belong to; None if the file holds the complete model
    step         optimizer steps so far
    data         fingerprint of the images and labels trained on, see dataset.listing.fingerprint
    settings     the flags that decide a run's numbers, see training.state.DECISIVE_FLAGS
    updates      optimizer updates so far, at most `step`: steps with non-finite gradients make none
    encoder      digest of the encoder of the latents, see Autoencoder.encoder_digest; None for pixels, or if unknown
    lora_rank    rank of the low-rank updates; None if the method has none
    lora_targets keys of finetune.LORA_LAYERS, separated by spaces; None if the method has no low-rank updates
    original_classes  number of classes before the first extension (train.py --extend); None if there was none
    patch_rows   rows of the class table that the file holds, if it holds no others; its base has the others
    epoch        epochs completed
    scaler       state of the fp16 gradient scaler, or None
    format       ADAPTER or STATE; None for a checkpoint of DiT or FineDiffusion, which describes nothing
    file         the file it was read from
    trained      names of the tensors in an adapter that belong over its base's
    """

    model: str = checked(str, lambda name: name in DiT_models)
    image_size: int = checked(int, lambda size: 0 < size <= MOST_PIXELS)
    latent_size: int = checked(int, lambda size: 0 < size <= MOST_PIXELS)
    channels: int = checked(int, lambda count: 0 < count <= MOST_CHANNELS)
    vae: str = checked(str, str.isprintable)
    method: str = checked(str, lambda name: name in METHODS)
    embedder: str = checked(str, lambda name: name in EMBEDDERS)
    hierarchy: Hierarchy = checked(Hierarchy)
    null_row: bool = False
    base: Base | None = None
    step: int = checked(int, lambda step: step >= 0, default=0)
    data: str | None = of_state(str, default=None)
    settings: dict | None = of_state(dict, bool, default=None)
    updates: int | None = of_state(int, lambda updates: updates >= 0, default=None)
    encoder: str | None = optional(str)
    lora_rank: int | None = optional(int, lambda rank: 0 < rank <= MOST_RANK)
    lora_targets: str | None = optional(str, lambda targets: set(targets.split()) <= LORA_LAYERS.keys())
    original_classes: int | None = optional(int, lambda count: count > 0)
    patch_rows: list[int] | None = optional(list, lambda rows: rows and all(type(row) is int for row in rows))
    epoch: int | None = None
    scaler: dict | None = None
    format: str | None = None
    file: Path | None = unwritten()
    trained: frozenset[str] | None = unwritten()

    @property
    def tiered(self) -> bool:
        """Whether the class table has rows for superclasses."""
        return self.embedder != "null"

    @property
    def tiers(self) -> list[str] | None:
        """Names of the ranks above the classes that have rows, from coarse to fine; None if the table has a null row alone."""
        return [tier.name for tier in self.hierarchy.tiers] if self.tiered else None

    def to_record(self) -> dict:
        """Return the JSON form, without the hierarchy, which files hold as a tensor."""
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("written", True)}
        del record["hierarchy"]
        record["base"] = vars(self.base) if self.base else None
        return {name: value for name, value in record.items() if value is not None or name == "base"}

    @classmethod
    def from_record(cls, record: object, hierarchy: Hierarchy | None) -> "ModelDescription":
        """Read the inverse of `to_record`; unknown keys are ignored.

        Raises ValueError if a required field is missing or invalid.
        """
        if not isinstance(record, dict) or record.get("format") not in (ADAPTER, STATE):
            raise ValueError(f"its description is {record!r:.80}")
        known = {f.name: f for f in fields(cls) if f.metadata.get("written", True)}
        values = {name: record[name] for name in known if name in record} | {"hierarchy": hierarchy}
        for name, each in known.items():
            value = values.get(name)
            if "type" not in each.metadata or each.metadata.get("format", record["format"]) != record["format"]:
                continue
            if value is None and each.metadata.get("optional"):
                continue
            if type(value) is not each.metadata["type"] or not each.metadata["check"](value):
                raise ValueError(f"its description has {name} {value!r:.80}")
        found = [values.get(name) for name in ("lora_rank", "lora_targets")]
        if (None in found) == ("lora" in METHODS[values["method"]].trains):
            raise ValueError(
                f"its description has method {values['method']}, lora_rank {found[0]} and lora_targets {found[1]}"
            )
        base = values.get("base")
        if base is not None:
            if not isinstance(base, dict) or [type(base.get(key)) for key in ("path", "sha256")] != [str, str]:
                raise ValueError(f"its description has base {base!r:.80}")
            values["base"] = Base(base["path"], base["sha256"])
        return cls(**values)
