"""Train a classifier on real images, generated ones, or both, and try it on real ones.

    python -m tools.train_classifier --real birds --generated samples/fill --test birds-val --out classifiers/both.safetensors
    torchrun --nproc_per_node=8 -m tools.train_classifier --generated samples/inat --test inat/val --out cas/resnet50.safetensors

The network is a model of timm. It sees real and generated images through the same pixels: centre crops of `--image-size`,
of which training takes random crops. Writes the weights and the names of the classes, as evaluate.py --classifier reads
them, and with --test the accuracy on these images, overall, by superclass and by class. Trained on generated images alone,
that is the classification accuracy score (arXiv 1905.10887). If a run stops or is killed, the same command resumes it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from hierarchy import Hierarchy
from runtime.cli import Parser, check_range, run_command
from runtime.device import resolve_precision, set_tf32
from runtime.files import atomic_write
from runtime.processes import agree, agree_in_turns, keep_process_group, run_on_main, start_processes
from runtime.text import shorten
from tools.classifier import scores, training
from tools.classifier.data import LabelledImages, find_hierarchy, open_images

EXAMPLES = """
python -m tools.train_classifier --real birds --test birds-val --balance --out classifiers/real.safetensors
torchrun --nproc_per_node=8 -m tools.train_classifier --generated samples/inat --test inat/val --out cas/resnet50.safetensors
"""


# ---- flags ---------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add = parser.add_argument_group("images").add_argument
    add("--real", nargs="+", default=[], metavar="DIR", help="folders of real images to train on")
    add(
        "--generated",
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders of generated images to train on, or lists of tools.filter_images",
    )
    add("--test", metavar="DIR", help="folder of real images to try the classifier on; it never trains on them")
    add(
        "--hierarchy",
        help="inat2021, vegfru, a .json file or a folder of images; if not given, that of --real, --test or --generated",
    )
    add(
        "--balance",
        action="store_true",
        help="show every class equally often, by repeating the images of small classes",
    )
    add("--image-size", type=int, default=256, help="pixels per side of the centre crops, real and generated")
    add("--crop", type=float, default=0.35, help="smallest share of a centre crop that a random crop has; 1: all of it")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the images")
    add("--num-workers", type=int, default=4, help="processes that load images, for each training process")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="resnet50", help="name of a timm model")
    add("--input-size", type=int, default=0, help="pixels per side of its input; 0: its own")
    add("--weights", help="file of weights to start from, of any classes; if not given, they are drawn")
    add = parser.add_argument_group("optimisation").add_argument
    add("--max-steps", type=int, default=10_000, help="training steps")
    add("--batch-size", type=int, default=256, help="images per step, over all processes")
    add("--lr", type=float, default=1e-3, help="highest learning rate, of AdamW with a warm-up and a cosine")
    add("--weight-decay", type=float, default=0.05, help="of matrices and filters")
    add("--label-smoothing", type=float, default=0.1, help="share of the target that all classes share")
    add("--seed", type=int, default=0, help="seed of weights, order and crops")
    add("--mixed-precision", choices=["no", "bf16"], default="no", help="precision of the network")
    add = parser.add_argument_group("output").add_argument
    add(
        "--out",
        required=True,
        metavar="FILE",
        help="weights to write, .safetensors; other files beside it have its name",
    )
    add("--save-every", type=int, default=500, help="steps between two states that a run resumes from")
    return parser.parse_args(argv)


def check_settings(args: argparse.Namespace, world: int):
    """Raise ValueError if a flag is invalid or contradicts another."""
    many = (1, 10**9)
    check_range(args, image_size=many, max_steps=many, batch_size=many, save_every=many, input_size=(0, 10**5))
    check_range(args, crop=(0.01, 1), label_smoothing=(0, 0.99), weight_decay=(0, 1e3), seed=(0, 2**32 - 1))
    check_range(args, num_workers=(0, 1024))
    if not 0 < args.lr < float("inf"):
        raise ValueError(f"--lr is {args.lr}, expected a finite number above 0.")
    if not (args.real or args.generated):
        raise ValueError("There are no images to train on, expected --real, --generated or both: name a folder.")
    if Path(args.out).suffix != ".safetensors":
        raise ValueError(f"--out is {args.out}, expected a name that ends in .safetensors: add it.")
    if args.batch_size % world:
        nearest = max(1, round(args.batch_size / world)) * world
        raise ValueError(
            f"--batch-size is {args.batch_size}, expected a multiple of the {world} processes: pass {nearest}."
        )
    trained = {Path(source).resolve() for source in (*args.real, *args.generated)}
    if args.test and Path(args.test).resolve() in trained:
        raise ValueError(f"--test is {args.test}, which is trained on too, expected other images: name another folder.")


# ---- images --------------------------------------------------------------------------------------


def open_all(args: argparse.Namespace) -> tuple[Hierarchy, LabelledImages, LabelledImages | None]:
    """Return the hierarchy, the images to train on, and those to test on.

    Raises ValueError if they have no hierarchy or other classes, if a class has no image to train on, or if a test image is
    trained on.
    """
    tests = [args.test] if args.test else []
    hierarchy = find_hierarchy(args.hierarchy, [*args.real, *tests, *args.generated])
    images = open_images([*args.real, *args.generated], hierarchy)
    test = open_images(tests, hierarchy) if tests else None
    empty = [hierarchy.classes[label] for label, n in enumerate(images.counts(hierarchy.num_classes)) if not n]
    if empty:
        raise ValueError(
            f"{len(empty)} of {hierarchy.num_classes} classes have no image to train on ({shorten(empty)}), expected one or "
            "more: add some, for instance with sample_ddp.py --fill-to, or pass a smaller --hierarchy."
        )
    shared = (
        {Path(path).resolve() for path in test.paths} & {Path(path).resolve() for path in images.paths} if test else {}
    )
    if shared:
        raise ValueError(
            f"{len(shared)} images of --test are trained on too ({shorten(sorted(map(str, shared)))}), expected other images: "
            "name another folder."
        )
    return hierarchy, images, test


def describe(args: argparse.Namespace, hierarchy: Hierarchy, images: LabelledImages) -> dict:
    """Return everything that determines the weights, as JSON."""
    names = (
        "model",
        "input_size",
        "image_size",
        "crop",
        "flip",
        "balance",
        "max_steps",
        "batch_size",
        "lr",
        "weight_decay",
    )
    names += "label_smoothing", "seed", "mixed_precision", "weights"
    return {
        **{name: getattr(args, name) for name in names},
        "images": len(images),
        "image_list": images.fingerprint,
        "hierarchy": hierarchy.digest(),
    }


def file_beside(out: Path, suffix: str) -> Path:
    """Return the path of another file of the same classifier: STEM.classes.txt beside STEM.safetensors."""
    return out.with_suffix(suffix)


# ---- the command ---------------------------------------------------------------------------------


def write_classifier(out: Path, net: training.TimmNetwork, hierarchy: Hierarchy, settings: dict):
    """Write the names of the classes and the weights, and remove the state."""
    names = "\n".join(hierarchy.classes) + "\n"
    atomic_write(file_beside(out, ".classes.txt"), lambda part: part.write_text(names, encoding="utf-8"))
    training.save(out, net.model.state_dict(), settings["max_steps"], settings)
    file_beside(out, ".state.safetensors").unlink(missing_ok=True)


def write_test(args: argparse.Namespace, found, test: LabelledImages, hierarchy: Hierarchy, settings: dict):
    """Write and print the accuracies."""
    report = {"format": scores.FORMAT, **scores.score(found, test.labels, hierarchy)}
    report |= {"test": args.test, "real": args.real, "generated": args.generated, "training": settings}
    title = "Accuracy" if args.real else "Classification accuracy score"
    path = file_beside(Path(args.out), ".scores.json")
    scores.write_scores(path, report, f"{title} of {args.model}")
    row = report["overall"]
    shares = ", ".join(f"{name} {100 * row[name]:.1f}%" for name in ("top1", "top5", "superclass") if name in row)
    print(f"{title.lower()} on {row['n']:,} images of {args.test}: {shares} ({path})")


def main(argv: Sequence[str] | None = None):
    args = parse_args(argv)

    # Set up processes and images:
    state = start_processes()
    agree(state, check_settings, args, state.num_processes)
    if state.device.type == "cpu":
        torch.set_num_threads(1 if state.num_processes > 1 else torch.get_num_threads())
    set_tf32(True)
    hierarchy, images, test = agree(state, open_all, args)
    precision = agree(state, resolve_precision, args.mixed_precision, state.device)
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=state.device.type == "cpu")

    # Train, unless the file is complete:
    build = args.model, args.input_size, hierarchy.num_classes, args.weights, args.seed
    net = agree_in_turns(state, training.build_network, *build)
    out, settings = Path(args.out), describe(args, hierarchy, images)
    record = agree(state, training.read_record, out)
    if record:
        agree(state, training.check_same, record, settings, out)
        agree(state, training.load_classifier, out, net)
    else:
        training.train(accelerator, net, images, args, settings, file_beside(out, ".state.safetensors"))
        run_on_main(state, write_classifier, out, net, hierarchy, settings)
    if state.is_main_process:
        spec = f"{args.model}@{net.size[0]}={out}"
        print(f"{out}: {args.model}, {len(images):,} images of {hierarchy!r}; for evaluate.py: --classifier {spec}")

    # Test:
    if test is not None:
        options = args.image_size, args.batch_size // state.num_processes, args.num_workers
        found = scores.read_images(accelerator, net, test, *options)
        run_on_main(state, write_test, args, found, test, hierarchy, settings)
    keep_process_group()
    state.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
