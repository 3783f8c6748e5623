"""The page of the species browser in Chromium, if there is one: finding, drawing, comparing, sharing, accessibility."""

import json
import re
import shutil

import pytest
from helpers.tiny_files import write_adapter

from hierarchy import Hierarchy

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
playwright = pytest.importorskip("playwright.sync_api")
from helpers.browsing import Steps, browser, get, wait_for, write_many  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
expect = playwright.expect
expect.set_options(timeout=60_000)
if not CHROMIUM:
    pytest.skip("there is no Chromium", allow_module_level=True)
HTML = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pets(adapter, images):
    with browser("--ckpt", adapter, "--images", images, "--num-sampling-steps", 4) as server:
        yield server


@pytest.fixture
def visit(chromium):
    """visit(server, query="", **options of the context) -> a page without errors and without requests to other hosts."""
    contexts, found = [], []

    def visit(server, query="", **options):
        context = chromium.new_context(
            **{"viewport": {"width": 1280, "height": 800}, "accept_downloads": True} | options
        )
        page = context.new_page()
        page.set_default_timeout(60_000)
        contexts.append(context)
        page.on("pageerror", lambda error: found.append(str(error)))
        page.on("dialog", lambda dialog: found.append(dialog.message))
        page.on("request", lambda request: found.extend(foreign(request.url, server.port)))
        page.goto(f"http://localhost:{server.port}/{query}")
        expect(page.locator("#model")).to_contain_text("species")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not found


def foreign(url, port):
    return [] if url.startswith((f"http://localhost:{port}/", "data:", "blob:")) else [url]


def finished(page):
    expect(page.locator("#status")).to_have_text("Finished.")


def draw(page, name):
    page.fill("#search", name)
    page.press("#search", "Enter")
    finished(page)


def recipe_of(page, figure="#picture"):
    address = page.locator(f"{figure} a").get_attribute("href")
    return dict(re.findall(r"[?&](\w+)=([^&]*)", address))


# ---- finding -------------------------------------------------------------------------------------


def test_ten_thousand_species_are_found_by_all_names(visit, base, tmp_path, monkeypatch):
    monkeypatch.setenv("FINEDIFFUSION_CACHE", str(tmp_path))
    with browser("--ckpt", write_many(tmp_path, base)) as server:
        names = server.studio.names
        page = visit(server)
        scientific, common = next(pair for pair in names if pair[1])
        for query, expected in ((scientific.upper(), scientific), (common.replace("-", " "), common)):
            page.fill("#search", query)
            expect(page.locator("[role=option]").first).to_contain_text(expected)
        page.fill("#search", "fox")
        count = sum("fox" in f"{one} {other}".lower() for one, other in names)
        expect(page.locator("#count")).to_have_text(f"{count:,} found, the first 30 are shown")
        page.fill("#search", "birds")  # a superclass
        assert page.locator("[role=option]").count() == 30
        page.fill("#search", "no such species")
        expect(page.locator("#count")).to_have_text("0 found")
        page.select_option("#group", label="Fungi")
        page.fill("#search", "")
        hierarchy = server.studio.hierarchy
        fungi = int((hierarchy.parents == hierarchy.superclasses.index("Fungi")).sum())
        expect(page.locator("#count")).to_contain_text(f"{fungi:,} found")
        page.click("#tree > summary")
        while page.locator("#tree li button").count() == 0:  # down the ranks to a species
            page.locator("#tree details:not([open]) > summary").last.click()
        page.locator("#tree li button").first.click()
        finished(page)


def test_exact_names_come_first_then_beginnings_then_parts(visit, base, tmp_path):
    classes = ["unsealed box", "seal", "harbour seal", "sealion", "Éider", "my-seal"]
    hierarchy = Hierarchy.plain(classes, "order")
    with browser("--ckpt", write_adapter(tmp_path / "order.safetensors", base, hierarchy, "bitfit")) as server:
        page = visit(server)
        page.fill("#search", "SEAL")
        assert page.locator("[role=option]").all_inner_texts() == [
            "seal",
            "sealion",
            "harbour seal",
            "my-seal",
            "unsealed box",
        ]
        page.fill("#search", "eider")
        assert page.locator("[role=option]").all_inner_texts() == ["Éider"]
        expect(page.locator("#in")).to_be_hidden()  # there are no groups


def test_html_in_names_is_text(visit, base, tmp_path):
    hierarchy = Hierarchy((HTML, "b"), ("<b>cats", "dogs"), [0, 1], HTML)
    with browser("--ckpt", write_adapter(tmp_path / "html.safetensors", base, hierarchy)) as server:
        page = visit(server)
        page.fill("#search", "img")
        expect(page.locator("[role=option]")).to_have_text(HTML)
        page.press("#search", "Enter")
        finished(page)
        expect(page.locator("#title")).to_have_text(HTML)
        page.click("#tree > summary")
        expect(page.locator("#tree summary").nth(1)).to_contain_text("<b>cats")
        assert page.locator("img[src=x]").count() == 0


def test_recent_species_and_a_random_one(visit, pets):
    page = visit(pets)
    draw(page, "pug")
    draw(page, "lynx")
    page.reload()
    page.click("#seen > summary")
    assert page.locator("#recent button").all_inner_texts() == ["lynx", "pug"]
    page.locator("#recent button").last.click()
    expect(page.locator("#title")).to_have_text("pug")
    page.click("#random")
    finished(page)
    expect(page.locator("#real img")).to_have_attribute("alt", re.compile(", real"))


# ---- drawing, comparing, sharing -----------------------------------------------------------------


def test_keys_alone_lead_from_the_opening_to_a_saved_picture(visit, pets):
    page = visit(pets)
    page.keyboard.type("dogs")  # the search has the focus
    for key in ("ArrowDown", "ArrowDown", "ArrowUp", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    finished(page)
    expect(page.locator("#title")).to_have_text("pug")
    for _ in range(9):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "save":
            break
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert download.value.suggested_filename == "pug 0-0.png"
    query = page.locator("#save").get_attribute("href").split("?")[1]
    assert download.value.path().read_bytes() == get(pets.port, f"/image.png?{query}").body
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')").startswith("http")


def test_a_link_opens_the_same_pictures_side_by_side(visit, pets):
    page = visit(pets)
    draw(page, "beagle")
    page.click("#keep")
    page.fill("[name=scale]", "2.5")
    page.click("#settings .main")
    finished(page)
    draw(page, "lynx")
    left, right = recipe_of(page, "#kept"), recipe_of(page)
    assert (left["class"], left["scale"], right["class"], right["scale"]) == ("2", "4", "0", "2.5")
    assert right["noise"] == left["noise"] == "2"
    expect(page.locator("#command")).to_be_disabled()  # sample.py has no noise of another class
    other = visit(pets, page.url.split("/")[-1])
    finished(other)
    assert (recipe_of(other, "#kept"), recipe_of(other)) == (left, right)
    page.click("#keep")
    expect(page.locator("#kept")).to_be_hidden()
    page.go_back()
    finished(page)
    expect(page.locator("#title")).to_have_text("beagle")


def test_copy_the_link_and_the_command(visit, pets):
    page = visit(pets, permissions=["clipboard-read", "clipboard-write"])
    draw(page, "manx")
    page.click("#command")
    expect(page.locator("#status")).to_have_text("Command copied.")
    command = page.evaluate("navigator.clipboard.readText()")
    assert command.startswith("python sample.py --ckpt ") and " --classes 00001 " in command
    page.click("#link")
    expect(page.locator("#status")).to_have_text("Link copied.")
    assert page.evaluate("navigator.clipboard.readText()") == page.url


def test_a_gallery_of_positions(visit, pets):
    page = visit(pets)
    draw(page, "manx")
    page.click("#more")
    expect(page.locator("#gallery img")).to_have_count(8)
    page.locator("#gallery button").nth(5).click()
    finished(page)
    assert recipe_of(page)["position"] == page.input_value("[name=position]") == "5"


def test_a_second_client_sees_its_place_and_cancel_stops_within_a_step(visit, pets):
    with Steps(pets.studio) as steps:
        first, second = visit(pets), visit(pets)
        query = "?class=1&steps=100&seed=77"
        first.goto(f"http://localhost:{pets.port}/{query}")
        wait_for(lambda: pets.studio.line)
        steps.allow(1)
        expect(first.locator("#status")).to_have_text("Drawing the picture: step 1 of 100.")
        expect(first.locator("#picture img")).to_have_attribute("alt", "Preview")
        second.goto(f"http://localhost:{pets.port}/?class=2&steps=1&seed=78")
        expect(second.locator("#status")).to_have_text("Waiting: 1 before you in the line.")
        first.click("#cancel")
        expect(first.locator("#status")).to_have_text("Cancelled.")
        wait_for(lambda: len(pets.studio.line) == 1)
        steps.allow(1)  # the one that the first picture was waiting for
        steps.allow(1)
        finished(second)
        assert steps.made == 3


def test_errors_are_shown(visit, pets):
    page = visit(pets, "?class=99")
    expect(page.locator("#status")).to_contain_text("class is '99', expected one of")
    page = visit(pets, "?class=0&colour=red&scale=7")
    finished(page)
    assert recipe_of(page)["scale"] == "7"


# ---- for all -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_rule_of_accessibility_is_violated(theme, width, visit, pets):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = visit(pets, color_scheme=theme, viewport={"width": width, "height": 800}, bypass_csp=True)  # axe is a script

    def check():
        found = axe.run(page).response["violations"]
        assert not found, json.dumps([(each["id"], [node["html"] for node in each["nodes"]]) for each in found])
        assert page.evaluate("document.documentElement.scrollWidth") <= width

    check()
    page.fill("#search", "dogs")
    page.press("#search", "ArrowDown")
    check()
    page.press("#search", "Enter")
    finished(page)
    page.click("#keep")
    draw(page, "lynx")
    for summary in page.locator("summary").all():
        summary.click()
    page.click("#more")
    expect(page.locator("#gallery img")).to_have_count(8)
    check()
    expect(page.locator("[role=status]")).to_have_count(2)
