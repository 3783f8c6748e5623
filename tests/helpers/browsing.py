"""A species browser in this process, a plain client of it, and a model of thousands of species."""

import contextlib
import http.client
import json
import random
import sys
import threading
import time
from types import SimpleNamespace
from unittest.mock import patch

from helpers.tiny_files import write_adapter

from hierarchy import Hierarchy, names

LINEAGES = [  # of iNaturalist's superclasses
    "Animalia_Chordata_Aves",
    "Animalia_Chordata_Mammalia",
    "Animalia_Chordata_Reptilia",
    "Animalia_Arthropoda_Insecta",
    "Animalia_Mollusca_Gastropoda",
    "Fungi_Basidiomycota_Agaricomycetes",
    "Plantae_Tracheophyta_Magnoliopsida",
]
SYLLABLES = "ba co du fa ge hi lo ma ne or pa qui ra se ti ul va xe yo zi".split()
ADJECTIVES = "Red Blue Common Arctic Great Little Spotted Striped Northern Southern Giant Dwarf".split()
NOUNS = "Fox Raven Lizard Beetle Snail Mushroom Daisy Warbler Oak Moth Orchid Finch".split()


def many_species(count):
    """Return (folder name, common name) of invented species, in the form of iNaturalist's; a genus has about 4 of them."""
    draw, found = random.Random(0), {}
    while len(found) < count:
        words = ["".join(draw.choices(SYLLABLES, k=length)).capitalize() for length in (3, 3, 3)]
        lineage = f"{draw.choice(LINEAGES)}_{words[0]}ales_{words[1]}idae_{words[2]}us"
        for _ in range(draw.randint(1, 7)):
            epithet = "".join(draw.choices(SYLLABLES, k=4))
            common = f"{draw.choice(ADJECTIVES)}-{draw.choice(ADJECTIVES).lower()} {draw.choice(NOUNS)}"
            found[f"{lineage}_{epithet}"] = common if draw.random() < 0.8 else ""
    ordered = sorted(found.items())[:count]
    return [(f"{label:05d}_{folder}", common) for label, (folder, common) in enumerate(ordered)]


def write_many(folder, base, count=10_000):
    """Write an adapter of invented species, and their common names into the cache -> its path."""
    pairs = many_species(count)
    names.write_names(pairs)
    hierarchy = Hierarchy.from_class_names([name for name, _ in pairs], "invented").keep()
    return write_adapter(folder / "many.safetensors", base, hierarchy)


@contextlib.contextmanager
def browser(*flags, token=""):
    """Serve the page of `python -m tools.browse *flags` on a free port, with or without a token -> port, studio, token."""
    from tools.browse import __main__ as command
    from tools.browse import server, studio

    with patch.object(sys, "argv", ["browse", *map(str, flags)]):
        args = command.parse_args()
    studio = studio.Studio(args)
    listener = command.listen("127.0.0.1", 0)
    running = server.build_server(studio, token)
    thread = threading.Thread(target=running.run, args=([listener],))
    thread.start()
    try:
        yield SimpleNamespace(port=listener.getsockname()[1], studio=studio, token=token)
    finally:
        running.should_exit = True
        thread.join()
        studio.close()


def get(port, path, method="GET", body=None, **headers):
    """Ask for a path -> status, headers, body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    found = SimpleNamespace(status=answer.status, headers=answer.headers, body=answer.read())
    connection.close()
    return found


class Stream:
    """A client that has a picture drawn."""

    def __init__(self, port, path):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.connection.request("GET", path)
        self.answer = self.connection.getresponse()

    def until(self, **expected):
        """Read news until one has these values -> that one."""
        for line in self.answer:
            news = json.loads(line)
            if expected.items() <= news.items():
                return news
        raise AssertionError(f"no news of {expected}")

    def last(self):
        return [json.loads(line) for line in self.answer][-1]

    def leave(self):
        self.answer.close()
        self.connection.close()


class Steps:
    """Lets the model of a studio make only the forward passes that are allowed, inside a `with` block."""

    def __init__(self, studio):
        self.allowed, self.made = threading.Semaphore(0), 0
        self.model = studio.adapters[0].model

    def __enter__(self):
        self.handle = self.model.register_forward_pre_hook(self.wait)
        return self

    def __exit__(self, *_):
        self.handle.remove()
        self.allow(1000)  # to those that wait

    def wait(self, *_):
        assert self.allowed.acquire(timeout=60)
        self.made += 1

    def allow(self, count):
        self.allowed.release(count)


def wait_for(condition):
    """Wait until a condition is true, up to a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
