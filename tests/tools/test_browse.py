"""The species browser without a browser: pictures of links, the line, cancelled drawings, the guard, hostile clients."""

import io
import json
import re
import resource
import shlex
import shutil
import socket
import sys
from urllib.parse import quote

import numpy as np
import pytest
from helpers.refusals import refused
from helpers.species import SPECIES
from helpers.tiny_files import rewritten, write_adapter
from helpers.tiny_models import PETS, ROOT
from PIL import Image

import sample
from guidance import GUIDANCES
from hierarchy import Hierarchy, names

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
from helpers.browsing import Steps, Stream, browser, get, wait_for  # noqa: E402

from tools.browse import __main__ as command_line  # noqa: E402
from tools.browse import server, species, studio  # noqa: E402

SHORT = "steps=3&scale=2"


@pytest.fixture(scope="module")
def page(adapter, images):
    """A browser of the pets with their real images."""
    with browser("--ckpt", adapter, "--images", images) as page:
        yield page


def picture(body):
    """The pixels and the texts of a PNG."""
    with Image.open(io.BytesIO(body)) as image:
        return np.asarray(image), image.text


# ---- a link is a picture -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rich(adapter, tmp_path_factory):
    """A browser with a null row and a weak model: all kinds of guidance but that by the base."""
    folder = tmp_path_factory.mktemp("rich")
    rooted = rewritten(adapter, folder / "rooted.safetensors", null_row=True)
    weak = rewritten(rooted, folder / "weak.safetensors", null_row=None)
    with browser("--ckpt", rooted, "--weak", weak, "--guidance", "autoguidance") as page:
        yield page


@pytest.mark.parametrize("kind", GUIDANCES)
def test_a_link_has_the_pixels_of_the_command_in_its_picture(kind, rich, command, tmp_path):
    """The command is sample.py's; each kind has another sampler, interval and position."""
    assert list(rich.studio.choices["guidance"]) == list(GUIDANCES)
    i = GUIDANCES.index(kind)
    sampler = list(rich.studio.choices["sampler"])[i % 4]
    more = f"sampler={quote(sampler)}&position={i % 2}&seed={i}&low={i % 3}&parent_scale=3"
    answer = get(rich.port, f"/image.png?class=3&{SHORT}&guidance={kind}&{more}")
    assert answer.status == 200 and answer.headers["content-type"] == "image/png", answer.body
    pixels, text = picture(answer.body)
    program, script, *flags = shlex.split(text["Command"])
    assert (program, script) == ("python", "sample.py") and text["Title"] == "pug"
    result = command(sample.main, *flags, "--sample-dir", tmp_path)
    assert result.code == 0, result.err
    assert np.array_equal(pixels, np.asarray(Image.open(tmp_path / f"pug/{i % 2:06d}.png")))
    recipe = json.loads(text["Recipe"])
    assert (recipe["class"], recipe["guidance"], recipe["sampler"], recipe["seed"]) == (3, kind, sampler, i)


def test_a_picture_is_kept_by_its_settings(page):
    first = get(page.port, f"/image.png?class=3&{SHORT}")
    assert first.headers["cache-control"] == "no-cache"
    with Steps(page.studio) as steps:  # no step is allowed: nothing is drawn
        same = "/image.png?scale=2.0&steps=3&class=pug&seed=0&noise=3&position=00"
        again = get(page.port, same)
        assert (again.headers["etag"], again.body) == (first.headers["etag"], first.body)
        known = get(page.port, same, if_none_match=first.headers["etag"])
        assert (known.status, known.body, steps.made) == (304, b"", 0)
        steps.allow(100)
        others = [
            get(page.port, f"/image.png?class=3&{SHORT}&{more}")
            for more in ("seed=1", "low=5", "noise=2", "position=1")
        ]
        assert len({answer.headers["etag"] for answer in (first, *others)}) == 5
    assert (
        "Command" in picture(first.body)[1] and picture(others[2].body)[1]["Command"] == ""
    )  # sample.py has no such noise
    assert not np.array_equal(picture(others[2].body)[0], picture(first.body)[0])


def test_old_pictures_are_forgotten(adapter, monkeypatch):
    monkeypatch.setattr(studio, "MOST_BYTES", 1000)
    with browser("--ckpt", adapter) as page:
        for seed in range(6):
            assert get(page.port, f"/image.png?class=0&{SHORT}&seed={seed}").status == 200
        assert 0 < sum(map(len, page.studio.finished.values())) <= 1000


def test_another_adapter_beside(adapter, tmp_path):
    other = rewritten(adapter, tmp_path / "other.safetensors")
    with browser("--ckpt", adapter, "--beside", other) as page:
        answers = [get(page.port, f"/image.png?class=0&{SHORT}&adapter={i}") for i in (0, 1, 2)]
    (first, text), (second, text_2) = map(picture, (answers[0].body, answers[1].body))
    assert not np.array_equal(first, second) and answers[2].status == 400
    assert str(adapter) in text["Command"] and str(other) in text_2["Command"]


@pytest.mark.parametrize(
    "query, words",
    [
        ("", "class is '', expected one of "),
        ("class=fox", "class is 'fox', expected one of "),
        ("class=5", "class is '5'"),
        ("class=-1", "class is '-1'"),
        ("class=../../etc/passwd", "class is"),
        ("class=0&steps=0", "steps is '0', expected an integer from 1 to 250."),
        ("class=0&steps=251", "steps is '251'"),
        ("class=0&steps=1e2", "steps is '1e2'"),
        ("class=0&steps=" + "9" * 9999, "steps is '9999"),
        ("class=0&scale=nan", "scale is 'nan', expected a number from 0 to 100."),
        ("class=0&scale=inf", "scale is 'inf'"),
        ("class=0&scale=1e400", "scale is '1e400'"),
        ("class=0&seed=-1", "seed is '-1'"),
        ("class=0&seed=9007199254740992", "seed is '9007199254740992'"),
        ("class=0&position=1000", "position is '1000'"),
        ("class=0&low=9&high=8", "low is 9 and high 8"),
        ("class=0&guidance=null", "guidance is 'null', expected one of 'superclass', "),
        ("class=0&sampler=euler", "sampler is 'euler', expected one of 'ddpm'"),
        ("class=0&adapter=1", "adapter is '1', expected one of '0'"),
        ("class=0&colour=red", "The link has 'colour', expected class, "),
        ("class=%00%ff", "class is "),
    ],
)
def test_a_bad_link_is_one_sentence(query, words, page):
    for path in ("image.png", "draw"):
        answer = get(page.port, f"/{path}?{query}")
        line = answer.body.decode()
        assert answer.status == 400 and answer.headers["content-type"].startswith("text/plain")
        assert line.startswith(words) and line.endswith(".\n") and line.count("\n") == 1 and len(line) < 300


def test_a_picture_that_is_not_finite_is_an_error(page, monkeypatch):
    monkeypatch.setitem(server.NUMBERS, "scale", (float, 0, 1e39))
    query = "class=1&steps=3&scale=3e38"
    assert "is not finite" in Stream(page.port, f"/draw?{query}").last()["error"]
    assert get(page.port, f"/image.png?{query}").status == 400


# ---- the line ------------------------------------------------------------------------------------


def test_a_stream_tells_the_steps_and_the_recipe(page):
    found = [json.loads(line) for line in Stream(page.port, f"/draw?class=2&{SHORT}&seed=8").answer]
    assert found[0] == {"place": 0}
    told = {name: value for news in found for name, value in news.items()}
    assert (told["step"], told["steps"], told["recipe"]["class"]) == (3, 3, 2)
    assert told["preview"].startswith("data:image/jpeg;base64,") and told["command"].startswith(
        "python sample.py --ckpt "
    )
    again = [json.loads(line) for line in Stream(page.port, f"/draw?class=2&{SHORT}&seed=8").answer]
    assert [*again[-1]] == ["recipe", "command"] and not any("step" in news for news in again)


def test_a_second_client_sees_its_place_and_one_that_leaves_stops_within_a_step(page):
    with Steps(page.studio) as steps:
        first = Stream(page.port, "/draw?class=0&steps=50&seed=11")
        steps.allow(2)
        first.until(step=2)
        second = Stream(page.port, "/draw?class=1&steps=1&seed=12")
        second.until(place=1)
        third = Stream(page.port, "/draw?class=1&steps=1&seed=13")
        third.until(place=2)
        second.leave()
        third.until(place=1)
        first.leave()
        third.until(place=0)
        steps.allow(1)  # the one that the first client's picture was waiting for
        steps.allow(1)
        assert third.last()["recipe"]["seed"] == 13 and steps.made == 4
    assert not page.studio.line


def test_a_client_of_a_link_that_leaves_stops_it_too(page):
    with Steps(page.studio) as steps:
        link = Stream.__new__(Stream)
        link.connection = socket.create_connection(("127.0.0.1", page.port))
        link.connection.sendall(b"GET /image.png?class=0&steps=50&seed=21 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_for(lambda: page.studio.line)
        link.connection.close()
        wait_for(lambda: not page.studio.line)
        steps.allow(1)
        other = Stream(page.port, "/draw?class=1&steps=1&seed=22")
        steps.allow(1)
        assert "recipe" in other.last() and steps.made == 2


def test_a_full_line_is_told(page, monkeypatch):
    monkeypatch.setattr(studio, "MOST_JOBS", 2)
    with Steps(page.studio) as steps:
        waiting = [Stream(page.port, f"/draw?class=0&steps=1&seed={seed}") for seed in (31, 32)]
        wait_for(lambda: len(page.studio.line) == 2)
        assert Stream(page.port, "/draw?class=0&steps=1&seed=33").last()["error"].startswith("2 pictures wait already")
        answer = get(page.port, "/image.png?class=0&steps=1&seed=33")
        assert (answer.status, answer.body) == (503, b"2 pictures wait already: try again in a while.\n")
        steps.allow(2)
        assert all("recipe" in client.last() for client in waiting)


def test_the_same_picture_is_drawn_once_for_two_clients(page):
    with Steps(page.studio) as steps:
        clients = [Stream(page.port, "/draw?class=0&steps=2&seed=41") for _ in range(2)]
        wait_for(lambda: len(page.studio.line) == 2)
        steps.allow(2)
        assert all("recipe" in client.last() for client in clients) and steps.made == 2


# ---- the page and its guard ----------------------------------------------------------------------


def test_the_page_is_served_with_security_headers(page):
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        answer = get(page.port, path)
        assert answer.status == 200 and answer.headers["content-type"].startswith(kind)
        assert all(answer.headers[name] == value for name, value in server.HEADERS.items())
        assert b"http://" not in answer.body and b"https://" not in answer.body and b"style=" not in answer.body
    assert "script" not in answer.headers["content-security-policy"].replace("default-src 'self'", "")
    html = (ROOT / "tools/browse/page/index.html").read_text()
    assert html.count("<script") == html.count('<script type="module" src=') == 1 and not re.search(
        r" on\w+=| style=", html
    )


def test_the_page_learns_names_ranks_and_choices(page):
    answer = get(page.port, "/about.json")
    about = json.loads(__import__("gzip").decompress(answer.body))
    assert about["names"] == [[name.replace("_", " "), ""] for name in ("lynx", "manx", "beagle", "pug", "pug_dog")]
    assert about["tiers"] == [dict(name="superclass", nodes=["cats", "dogs"], of=[0, 0, 1, 1, 1])] and about["real"]
    assert about["limits"]["steps"] == [1, 250] and about["defaults"]["sampler"] == "unipc"


def test_species_have_common_names_and_the_ranks_of_their_names(tmp_path, monkeypatch):
    monkeypatch.setenv("FINEDIFFUSION_CACHE", str(tmp_path))
    names.write_names([(folder, "<b>Red Fox</b>" if "vulpes" in folder else "") for folder in SPECIES])
    two_tiers = Hierarchy.from_class_names(SPECIES).keep()
    assert species.name_pairs(two_tiers)[7] == ("Vulpes vulpes", "<b>Red Fox</b>")
    for hierarchy in (two_tiers, Hierarchy.from_class_names(SPECIES)):
        ranks = species.known_ranks(hierarchy)
        assert [rank["name"] for rank in ranks] == ["superclass", "class", "order", "family", "genus"]
        assert [rank["nodes"][rank["of"][7]] for rank in ranks] == [
            "Mammals",
            "Mammalia",
            "Carnivora",
            "Canidae",
            "Vulpes",
        ]
    assert species.known_ranks(Hierarchy.plain(("a", "b"), "x")) == []


def test_real_images(page, adapter):
    with Image.open(io.BytesIO(get(page.port, "/real.jpg?class=3").body)) as strip:
        assert strip.size == (4 * species.REAL_PIXELS, species.REAL_PIXELS)
    with browser("--ckpt", adapter) as other:
        assert get(other.port, "/real.jpg?class=3").status == 404


@pytest.mark.parametrize(
    "path",
    [
        "/../studio.py",
        "/%2e%2e/studio.py",
        "/..%2fstudio.py",
        "//etc/passwd",
        "/%00",
        "/\\..\\studio.py",
        "/x" * 999,
    ],
)
def test_paths_lead_nowhere_else(path, page):
    answer = get(page.port, path)
    assert answer.status == 404 and len(answer.body) < 100, answer.body


def test_requests_that_are_refused(page):
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost:1@evil.example", "", "[::1"):
        assert get(page.port, "/", host=host).status == 403, host
    for host in ("localhost", f"LOCALHOST:{page.port}", "127.0.0.1:1"):
        assert get(page.port, "/", host=host).status == 200, host
    foreign = dict(sec_fetch_site="cross-site", sec_fetch_mode="no-cors")
    assert get(page.port, "/image.png?class=0", **foreign).status == 403
    assert get(page.port, "/", **foreign | dict(sec_fetch_mode="navigate")).status == 200
    assert get(page.port, "/image.png?class=0", "POST", b"x" * 100_000).status == 405
    assert get(page.port, f"/image.png?{'a' * 100_000}").status in (400, 414)


def test_other_machines_need_the_token(adapter):
    with browser("--ckpt", adapter, token="secret-1") as page:
        link = f"image.png?class=0&{SHORT}"
        for path in ("/", f"/{link}", f"/secret/{link}", f"/secret-12/{link}", f"/%FF/{link}", "/secret-1%C3%A9/"):
            answer = get(page.port, path, host="lab.example")
            assert (answer.status, answer.body) == (403, b"The address lacks its token.\n"), path
        assert get(page.port, f"/secret-1/{link}", host="lab.example").status == 200
        assert get(page.port, "/secret-1/", host="lab.example").status == 200
        assert get(page.port, "/secret-1", host="lab.example").headers["location"] == "/secret-1/"


def test_a_thousand_open_connections_harm_nothing(page, monkeypatch):
    """Half of them have sent the beginning of a request, and all are closed after a while."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 3000:
        pytest.skip(f"this process may open {most} files")
    monkeypatch.setattr(server, "SILENT_SECONDS", 1)
    idle = [socket.create_connection(("127.0.0.1", page.port)) for _ in range(1000)]
    for connection in idle[::2]:
        connection.sendall(b"GET /image.png?class=0 HTTP/1.1\r\nHost: local")
    assert get(page.port, f"/image.png?class=4&{SHORT}&seed=51").status == 200
    for connection in idle:
        connection.settimeout(60)
        assert connection.recv(1) == b""
        connection.close()


# ---- the command line ----------------------------------------------------------------------------


def test_bad_flags_are_one_sentence(adapter, base, images, command, tmp_path):
    def fails(*flags):
        return command(command_line.main, "--ckpt", adapter, "--no-open", "--port", 0, *flags)

    refused(fails("--num-sampling-steps", 500), "steps is '500', expected an integer from 1 to 250")
    refused(fails("--guidance", "null"), "guidance is 'null', expected one of ")
    refused(fails("--port", 70000), "--port is 70000")
    refused(fails("--beside", write_adapter(tmp_path / "x.safetensors", base, PETS)), "--beside is", "the same classes")
    shutil.copytree(images / "cats", tmp_path / "cats")
    refused(fails("--images", tmp_path / "cats"), "lacks 3 of the 5 classes")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(fails("--port", taken.getsockname()[1]), "cannot be used", "pass another --port")
    refused(fails("--host", "no.such.host.invalid"), "no.such.host.invalid port 0 cannot be used")


def test_missing_packages_are_one_sentence(adapter, command, monkeypatch):
    monkeypatch.delitem(sys.modules, "tools.browse.server")
    monkeypatch.delattr("tools.browse.server")
    monkeypatch.setitem(sys.modules, "starlette", None)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    refused(command(command_line.main, "--ckpt", adapter), "pip install starlette uvicorn")
