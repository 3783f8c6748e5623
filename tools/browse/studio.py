"""Draw pictures one after another: adapters, the line of jobs in front of the thread that draws, finished pictures."""

import argparse
import asyncio
import base64
import io
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace

import torch
from PIL import Image, PngImagePlugin

from diffusion import create_diffusion
from guidance import GUIDANCES, check_guidance, guided, hash_integer
from hierarchy.hierarchy import SUPERCLASS
from runtime.device import best_device, check_gpu, explain_full_memory, half_dtype, resolve_precision, set_tf32
from sampling.load import SWAPPING, build_guidance, load_model
from sampling.samplers import SAMPLERS, check_finite_images, draw_noise, noise_stream, run_sampler, to_uint8
from sampling.speed import speed_up
from tools.browse.recipe import Recipe, default_settings, read_recipe, sample_command
from tools.browse.species import name_pairs, real_folders

MOST_JOBS = 32  # in the line, with the one that is being drawn
MOST_BYTES = 1 << 26  # of finished pictures
PREVIEW_SHARE, PREVIEW_PIXELS = 0.2, 256  # most of the time for previews, most pixels per side
ALPHAS = create_diffusion("").alphas_cumprod


def to_image(pixels: torch.Tensor) -> Image.Image:
    """Convert decoded pixels (1, 3, H, W) in [-1, 1]."""
    return Image.fromarray(to_uint8(pixels)[0].permute(1, 2, 0).numpy())


class Adapter:
    """A model on its device, with the kinds of guidance that it allows. Raises ValueError if it cannot be read."""

    def __init__(self, args: argparse.Namespace, ckpt: str | None):
        device, flags = best_device(), vars(args) | {"ckpt": ckpt, "guidance": None}
        self.half, self.ckpt, self.guidances = half_dtype(resolve_precision(args.mixed_precision, device)), ckpt, {}
        self.model, self.about, self.autoencoder = load_model(argparse.Namespace(**flags), device, self.half)
        self.tiers = {name if i else SUPERCLASS: i for i, name in enumerate(self.about.tiers or [SUPERCLASS])}
        for kind in GUIDANCES:
            try:
                if not (kind in SWAPPING and self.about.lora_rank):  # low-rank updates are merged: none to exchange
                    guided_args = argparse.Namespace(**flags | {"guidance": kind})
                    self.guidances[kind] = build_guidance(guided_args, self.model, self.about)
            except ValueError:
                continue  # the model lacks rows or weights for it
        speed_up(self.model, self.half, bool(args.compile), swaps=not self.guidances.keys().isdisjoint(SWAPPING))
        file = os.stat(self.about.file)
        self.version = self.about.file, file.st_size, file.st_mtime_ns, str(self.half), args.cfg_channels, args.weak

    def draw(self, recipe: Recipe, report: Callable) -> Image.Image:
        """Return a picture, with the noise and the arithmetic of `sampling.samplers.sample_keyed`.

        report(x, t, prediction) is called at each step; an exception from it ends the drawing. Raises ValueError if the model
        cannot be guided so, or the picture is not finite.
        """
        model, key = self.model, (recipe["seed"], recipe["noise"], recipe["position"])
        device, shape = model.pos_embed.device, (model.in_channels, model.input_size, model.input_size)
        settings = dict(scale=recipe["scale"], parent_scale=recipe["parent_scale"], tier=self.tiers[recipe["guide"]])
        guidance = replace(self.guidances[recipe["guidance"]], interval=(recipe["low"], recipe["high"]), **settings)
        check_guidance(guidance, model.y_embedder)
        prediction = guided(model, torch.tensor([recipe["class"]], device=device), guidance, [key])
        streams = [noise_stream(*key)]

        def predict(x, t):
            with torch.autocast(device.type, self.half, enabled=self.half is not None):
                found = prediction(x, t).float()
            report(x, t, found)
            return found

        with explain_full_memory(1, "stop other programs that use it"):
            noise = lambda: draw_noise(streams, shape, device)  # noqa: E731
            pixels = self.autoencoder.decode(run_sampler(predict, noise, recipe["sampler"], recipe["steps"]))
        check_finite_images(pixels, [f"Image {recipe['position']} of class {recipe['class']} of seed {recipe['seed']}"])
        return to_image(pixels)


class Job:
    """A picture that a client waits for, and the latest `news` that it has not been told: place, step, steps, preview."""

    def __init__(self, recipe: Recipe, previews: bool = False):
        self.recipe, self.previews, self.cancelled = recipe, previews, False
        self.news, self.changed, self.loop = {}, asyncio.Event(), asyncio.get_running_loop()

    def tell(self, **news):
        """Add to the news; called in the thread of the server."""
        self.news |= news
        self.changed.set()

    def draw(self, adapter: Adapter) -> Image.Image:
        """Return the picture. Raises CancelledError at the first step after the client has left."""
        step, start, spent = 0, time.monotonic(), 0.0

        def report(x, t, prediction):
            nonlocal step, spent
            if self.cancelled:
                raise CancelledError
            step, begun, news = step + 1, time.monotonic(), {}
            if self.previews and spent <= PREVIEW_SHARE * (begun - start):
                x_0 = (x - (1 - ALPHAS[t]) ** 0.5 * prediction[:, : x.shape[1]]) / ALPHAS[t] ** 0.5
                preview, file = to_image(adapter.autoencoder.decode(x_0.clamp(-4, 4))), io.BytesIO()
                preview.thumbnail((PREVIEW_PIXELS, PREVIEW_PIXELS))
                preview.save(file, "JPEG", quality=80)
                news["preview"] = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
                spent += time.monotonic() - begun
            now = dict(step=step, steps=self.recipe["steps"], **news)
            self.loop.call_soon_threadsafe(lambda: self.tell(**now))

        return adapter.draw(self.recipe, report)


class Studio:
    """The adapters and their classes, one thread that draws, the line of jobs, and the finished pictures by ETag."""

    def __init__(self, args: argparse.Namespace):
        check_gpu(best_device())
        set_tf32(args.tf32)
        self.args, self.adapters = args, [Adapter(args, path) for path in (args.ckpt, *filter(None, [args.beside]))]
        first, last, self.hierarchy = self.adapters[0], self.adapters[-1], self.adapters[0].about.hierarchy
        if last.about.hierarchy.classes != self.hierarchy.classes:
            raise ValueError(f"--beside is {args.beside}, expected an adapter of the same classes as {args.ckpt}.")
        self.names, self.defaults = name_pairs(self.hierarchy), default_settings(args)
        labels = {name: label for label, pair in enumerate(self.names) for name in pair if name}
        labels |= {str(label): label for label in range(len(self.names))}
        self.choices = {"class": labels, "noise": labels, "adapter": {str(i): i for i in range(len(self.adapters))}}
        self.choices["sampler"] = {name: name for name in SAMPLERS}
        self.choices["guidance"] = {name: name for name in first.guidances if name in last.guidances}
        self.choices["guide"] = {name: name for name in first.tiers if name in last.tiers}
        self.read({"class": "0"})  # checks the defaults
        self.images = real_folders(args.images, self.hierarchy) if args.images else {}
        self.line, self.worker, self.finished = [], ThreadPoolExecutor(1), {}

    def read(self, query: dict[str, str]) -> Recipe:
        """Return the recipe of a link. Raises ValueError if it is none."""
        return read_recipe(query, self.defaults, self.choices)

    def command(self, recipe: Recipe) -> str:
        """Return the sample.py command of a picture, "" if there is none."""
        return sample_command(recipe, self.args, self.adapters[recipe["adapter"]].ckpt)

    def tag(self, recipe: Recipe) -> str:
        """Return an ETag, which differs between pictures that differ."""
        return f'"{hash_integer(repr((self.adapters[recipe["adapter"]].version, recipe))):032x}"'

    async def wait_for(self, job: Job) -> bytes:
        """Return the picture of a job as PNG once its turn has come; if the task is cancelled, the job is.

        Raises QueueFull if the line is full, and ValueError as `Adapter.draw`.
        """
        if png := self.finished.get(self.tag(job.recipe)):
            return png
        if len(self.line) >= MOST_JOBS:
            raise asyncio.QueueFull(f"{len(self.line)} pictures wait already: try again in a while.")
        self.line.append(job)
        self.tell_places()
        try:
            return await asyncio.wrap_future(self.worker.submit(self.finish, job))
        finally:
            job.cancelled = True
            self.line.remove(job)
            self.tell_places()

    def tell_places(self):
        for place, job in enumerate(self.line):
            job.tell(place=place)

    def finish(self, job: Job) -> bytes:
        """Draw and keep a picture, unless it has been drawn meanwhile; called in the thread that draws."""
        recipe, tag = job.recipe, self.tag(job.recipe)
        if tag not in self.finished:
            image, text, file = job.draw(self.adapters[recipe["adapter"]]), PngImagePlugin.PngInfo(), io.BytesIO()
            about = dict(Title=", ".join(filter(None, self.names[recipe["class"]])), Software="FineDiffusion")
            for name, value in (about | dict(Recipe=json.dumps(recipe), Command=self.command(recipe))).items():
                text.add_text(name, value)
            image.save(file, "PNG", pnginfo=text)
            self.finished[tag] = file.getvalue()
            while sum(map(len, self.finished.values())) > MOST_BYTES:
                del self.finished[next(iter(self.finished))]  # the oldest
        return self.finished[tag]

    def close(self):
        """Stop drawing at the next step."""
        for job in self.line:
            job.cancelled = True
        self.worker.shutdown(cancel_futures=True)
