"""What a training step needs of a GPU's memory, counted before it is made.

Weights, averages, moments and gradients are counted from the parameters. What a forward pass keeps for the backward
pass is counted by making one for an image or two and adding up what autograd saves, which is the same on a CPU.
"""

import torch

GIB = 2**30
SPARE = 0.08  # share of the GPU that the CUDA context, libraries and fragments take


def saved_bytes(run, model):
    """Bytes that autograd keeps for the backward pass of `run()`, the model's own parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()  # alive until the count is done: an address is not given away twice
    del result
    return sum(kept.values())


def activation_bytes(model, autocast):
    """(bytes per image, bytes per pass) that a training step's forward pass keeps, by one of 1 and one of 2 images.

    The second is autocast's copies of trained weights. Nothing random is used and nothing changes.
    """
    device, shape = model.pos_embed.device, (model.in_channels, model.input_size, model.input_size)

    def forward(images):
        x = torch.zeros(images, *shape, device=device)
        zeros = torch.zeros(images, dtype=torch.long, device=device)
        with autocast():
            return model(x, zeros, zeros, force_drop_ids=zeros)

    one, two = (saved_bytes(lambda: forward(images), model) for images in (1, 2))  # noqa: B023
    return two - one, 2 * one - two


def forecast_bytes(model, parameters, per_image, per_pass, images, vae=None):
    """{what: bytes} of a training with `images` of them in a pass. `parameters`: those that are trained, {name: tensor}."""
    trained = sum(p.numel() for p in parameters.values())
    everything = [*model.parameters(), *model.buffers(), *(vae.parameters() if vae else ())]
    return {
        "weights": sum(t.numel() * t.element_size() for t in everything),
        "gradients, moments and averages": 4 * 4 * trained,  # float32: one, two and one of each
        "activations": per_image * images + per_pass,
    }


def describe(need, per_image, images, capacity=None):
    """A sentence with the forecast; with the `capacity` of the GPU in bytes, what to do where that is too little."""
    total = sum(need.values())
    parts = ", ".join(f"{what} {size / GIB:.2f}" for what, size in need.items())
    text = f"memory: about {total / GIB:.1f} GiB a process ({parts}; {per_image / 2**20:.0f} MiB an image, {images} in a pass)"
    if capacity is None:
        return text
    room = capacity * (1 - SPARE)
    text += f" of {capacity / GIB:.1f}"
    if total <= room:
        return text
    fits = int((room - total) // per_image) + images
    return f"{text}: too much, {advice(min(fits, images - 1))}"


def advice(micro_batch):
    """What to turn where the memory does not suffice."""
    first = f"pass --micro-batch {micro_batch} (the same numbers in more passes), " if micro_batch > 0 else "pass "
    return f"{first}--mixed-precision bf16 or fp16, or --grad-checkpointing"
