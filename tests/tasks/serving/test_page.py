"""The page, driven in a real browser on a real service."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tasks.serving.http.keys import add_key
from tasks.serving.http.settings import ServiceSettings
from tests import tiny
from tests.tasks.serving import browser as browsers
from tests.tasks.whole_runs import SAMPLES, WholeRun, configuration, whole_run

pytestmark = pytest.mark.integration

# As captions of the first samples and queries: markup, and what a spreadsheet would compute.
HOSTILE = ['<img src=x onerror="window.planted=1">', "=1+1", "</script><script>window.planted=1</script>"]
PHONE = {"width": 375, "height": 812}
PLACES = [
    "",
    "#/?query=s0003",
    "#/?query=s0003&beside=all",
    "#/?query=s0003&open=0",
    "#/queries",
    "#/shares",
    "#/versions",
]


CREATORS = ["Ana Lenz", HOSTILE[0], "O'Hara"]


def members(count: int) -> list[tuple[str, bytes]]:
    """Shapes with captions, the first ones hostile, and creators."""
    plain = dict(tiny.sample_members(range(count)))
    captions = [*HOSTILE, *(plain[f"s{number:04d}.txt"].decode() for number in range(len(HOSTILE), count))]
    found = []
    for number, caption in enumerate(captions):
        described = {
            "caption": caption,
            "creator": CREATORS[number % 3],
            "year": 2000 + number,
            "made in": "Ulm",
            "group": f"Group {number % 2}",
        }
        name = f"s{number:04d}"
        found += [(f"{name}.jpg", plain[f"{name}.jpg"]), (f"{name}.json", json.dumps(described).encode())]
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> WholeRun:
    """A run with sketches."""
    folder = tmp_path_factory.mktemp("page")
    teacher = {"name": "abu_plus_first_order", "alpha": 1e-4, "timesteps": 2, "gradient_pairs": 4, "shard_samples": 16}
    config = configuration(
        folder, model_folder, teacher=teacher, curvature={"samples": 16}, sketches={}, self_consistency=None
    )
    tiny.write_tar(folder / "shapes.tar", members(SAMPLES))
    tiny.write_tar(folder / "queries.tar", members(8))
    return whole_run(config)


@pytest.fixture(scope="module")
def settings(made: WholeRun) -> ServiceSettings:
    return ServiceSettings(workspace=str(made.workspace.root))


@pytest.fixture(scope="module")
def url(settings: ServiceSettings) -> Iterator[str]:
    with browsers.service(settings) as address:
        yield address


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browsers.chromium() as browser:
        yield browser


@pytest.fixture
def page(chromium: Browser, url: str) -> Iterator[Page]:
    """A fresh tab, of which nothing may end up in the console."""
    context = chromium.new_context(base_url=url, permissions=["clipboard-read", "clipboard-write"])
    tab = context.new_page()
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: said.append(str(error)))
    yield tab
    assert tab.evaluate("window.planted") is None
    context.close()
    assert said == []


def asked(url: str, **question: Any) -> dict[str, Any]:
    answer: dict[str, Any] = (
        httpx.post(f"{url}/v1/attribute", json={"k": 24, "around": 12, **question}).raise_for_status().json()
    )
    return answer


def shown(page: Page, section: str = "#raised") -> list[str]:
    """The captions of a section, when its first picture is there."""
    page.locator(f"{section} .card img").first.wait_for()
    return page.locator(f"{section} .card .title").all_inner_texts()


def captions(hits: list[dict[str, Any]]) -> list[str]:
    return [hit["captions"][0] for hit in hits]


def visit(page: Page, place: str) -> None:
    """Load a place from nothing, and wait until all of it is there."""
    page.goto("about:blank")
    page.goto(f"/{place}")
    page.locator("main[aria-busy=false]").wait_for()
    if "open=" in place:
        page.locator("dialog dl, dialog [role=alert]").wait_for()


def picture(number: int) -> bytes:
    return tiny.draw(number)[0]


def test_a_stored_query_is_answered_and_the_address_gives_the_same_answer(
    page: Page, chromium: Browser, url: str
) -> None:
    page.goto("/")
    page.locator(".queries a").first.click()
    query = page.url.split("query=")[1]
    expected = captions(asked(url, query_id=query)["hits"])
    assert shown(page) == expected
    expect(page.locator("#live")).to_contain_text(f"{len(expected)} training images")
    page.reload()
    assert shown(page) == expected
    other = chromium.new_page()
    other.goto(page.url)
    assert shown(other) == expected
    other.close()
    page.go_back()
    expect(page.locator("#ask")).to_be_visible()


def test_the_label_says_how_far_to_believe_an_answer(page: Page, url: str) -> None:
    answer = asked(url, query_id="s0003")
    page.goto("/#/?query=s0003")
    plate = page.locator(".plate")
    expect(plate).to_contain_text("It is not proof")
    agreement = [answer["agreement"]["value"], answer["agreement"]["error"]]
    said = page.evaluate("async (given) => (await import('/words.js')).withError(...given)", agreement)
    for each in (answer["lineage"], str(answer["versions"]["published"]), said):
        expect(plate).to_contain_text(each)
    plate.locator("summary").click()
    expect(plate).to_contain_text(answer["versions"]["run"])


def test_figures_are_written_as_far_as_their_errors_count(page: Page) -> None:
    page.goto("/")
    said = {
        (0.88634, 0.01235): "0.886 ± 0.012",
        (0.97592, 0.00496): "0.976 ± 0.005",
        (0.68, 0.2): "0.7 ± 0.2",
        (0.0013983, 0.0000795): "(1.40 ± 0.08) × 10⁻³",
        (-0.0013983, 0.0000195): "(-1.398 ± 0.019) × 10⁻³",
        (1234.5, 20): "1235 ± 20",
        (0.88634, None): "0.886",
        (0.0000795, None): "7.95 × 10⁻⁵",
        (None, None): "–",
    }
    for given, text in said.items():
        found = page.evaluate("async (given) => (await import('/words.js')).withError(...given)", list(given))
        assert found == text


def test_what_is_not_all_is_never_a_hundred_percent(page: Page) -> None:
    page.goto("/")
    said = {1.0: "100.0 %", 0.99975: "99.975 %", 0.999999: "99.999 %", 0.9994: "99.9 %", 0.0004: "0.0 %"}
    for part, text in said.items():
        assert page.evaluate("async (part) => (await import('/words.js')).percent(part)", part) == text


def test_conditions_quote_names_and_values(page: Page) -> None:
    page.goto("/")
    said = {
        ("creator", "VARCHAR", "=", "O'Hara"): "\"creator\" = 'O''Hara'",
        ("it's odd", "VARCHAR", "<>", "c"): "(metadata->>'it''s odd') <> 'c'",
        ("year", "BIGINT", ">=", "2010"): '"year" >= 2010',
        ("year", "BIGINT", ">=", "1 or 1=1"): "\"year\" >= '1 or 1=1'",
        ("key", "VARCHAR", "contains", "S%"): "contains(lower(cast(\"key\" as varchar)), 's%')",
    }
    for (name, kind, operator, value), text in said.items():
        script = "async ([column, ...rest]) => (await import('/filters.js')).condition(column, ...rest)"
        assert page.evaluate(script, [{"name": name, "type": kind}, operator, value]) == text


def test_a_picture_is_picked_and_answered_and_stays_after_a_reload(page: Page, chromium: Browser, url: str) -> None:
    page.goto("/")
    page.locator("#file").set_input_files({"name": "x.jpg", "mimeType": "image/jpeg", "buffer": picture(5)})
    expect(page.locator(".drop img")).to_be_visible()
    page.locator("#caption").fill("a red circle")
    page.locator("#caption").press("Enter")
    expected = captions(asked(url, image=base64.b64encode(picture(5)).decode(), caption="a red circle")["hits"])
    assert shown(page) == expected
    fingerprint = hashlib.sha256(picture(5)).hexdigest()[:16]
    assert f"upload={fingerprint}" in page.url
    expect(page.locator("#out")).to_contain_text("does not hold it")
    page.reload()
    assert shown(page) == expected
    elsewhere = chromium.new_page()
    elsewhere.goto(page.url)
    expect(elsewhere.locator("h1")).to_contain_text("does not hold")
    expect(elsewhere.locator("main")).to_contain_text(fingerprint)
    elsewhere.locator("#file").set_input_files({"name": "x.jpg", "mimeType": "image/jpeg", "buffer": picture(6)})
    elsewhere.locator("#ask").click()
    assert len(shown(elsewhere)) == len(expected)
    elsewhere.close()


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_a_picture_is_pasted_or_dropped_anywhere(page: Page, kind: str) -> None:
    page.goto("/#/versions")
    page.locator("h1").wait_for()
    page.evaluate(
        """async ([kind, text]) => {
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "x.jpg", { type: "image/jpeg" }));
            const event = kind === "paste" ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
                : new DragEvent("drop", { dataTransfer: data, bubbles: true });
            document.body.dispatchEvent(event);
        }""",
        [kind, base64.b64encode(picture(2)).decode()],
    )
    expect(page.locator(".drop img")).to_be_visible()
    expect(page.locator("#caption")).to_be_focused()
    page.locator("#caption").fill("a blue square")
    page.locator("#ask").click()
    assert shown(page)


def test_nothing_is_asked_without_picture_and_caption(page: Page) -> None:
    page.goto("/")
    page.locator("#ask").click()
    expect(page.get_by_role("alert")).to_have_text("Bring a picture, or type a caption.")


def test_an_image_opens_a_dialog_that_the_address_holds(page: Page, url: str) -> None:
    page.goto("/#/?query=s0003")
    card = page.locator("#raised .card button").nth(1)
    hit = asked(url, query_id="s0003")["hits"][1]
    card.click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text(hit["key"])
    expect(dialog).to_contain_text(Path(hit["shard"]).name)
    assert f"open={hit['train_id']}" in page.url
    page.reload()
    expect(dialog).to_contain_text(hit["key"])
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page).not_to_have_url(re.compile("open="))
    card.click()
    dialog.locator("#search-by-this").click()
    expect(dialog).to_be_hidden()
    found = shown(page)
    assert found and f"sample={hit['train_id']}" in page.url
    ids = page.locator("#raised .card button").evaluate_all("(all) => all.map((each) => each.id.split('-')[2])")
    assert str(hit["train_id"]) not in ids  # the sample itself is left out


def test_captions_and_metadata_are_never_markup(page: Page) -> None:
    for place in (
        "#/queries",
        "#/?query=s0000",
        "#/?sample=2",
        "#/?query=s0003&open=0",
        "#/?open=1&query=s0001",
        "#/shares?by=creator",
    ):
        visit(page, place)
        assert page.locator("img[src=x]").count() == 0
        assert page.evaluate("window.planted") is None
    page.goto("/#/?query=s0000")
    expect(page.locator(".panel .title")).to_have_text(HOSTILE[0])
    assert page.locator(".panel img").get_attribute("alt") == HOSTILE[0]


def test_what_stands_in_an_address_is_never_markup(chromium: Browser, url: str) -> None:
    page = chromium.new_page(base_url=url)
    for name in ("query", "sample", "upload", "caption", "open", "view"):
        visit(page, "#/?" + urlencode({"query": "s0003", "where": HOSTILE[0], "beside": HOSTILE[0], name: HOSTILE[0]}))
        assert page.locator("img[src=x]").count() == 0
        assert page.evaluate("window.planted") is None
    visit(page, "#/shares?" + urlencode({"by": HOSTILE[0], "split": HOSTILE[0], "query": HOSTILE[0]}))
    assert page.locator("img[src=x]").count() == 0
    page.close()


def test_no_script_of_another_place_or_in_the_page_would_run(page: Page, url: str) -> None:
    policy = httpx.get(f"{url}/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    source = httpx.get(f"{url}/").text
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=|https?:|//", source)
    hosts = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "//" in request.url else None)
    page.goto("/#/?query=s0003")
    shown(page)
    assert hosts == {url.split("//")[1]}


def test_an_answer_is_downloaded_as_json_and_csv(page: Page, url: str) -> None:
    answer = asked(url, query_id="s0003")
    page.goto("/#/?query=s0003")
    with page.expect_download() as waiting:
        page.locator("#download-json").click()
    kept = json.loads(waiting.value.path().read_text())
    assert waiting.value.suggested_filename == "fastgda-s0003-fast.json"
    assert {**kept, "seconds": 0} == {**answer, "seconds": 0}
    with page.expect_download() as waiting:
        page.locator("#download-csv").click()
    rows = list(csv.DictReader(io.StringIO(waiting.value.path().read_text())))
    hits = [row for row in rows if row["section"] == "hits"]
    assert [int(row["train_id"]) for row in hits] == [hit["train_id"] for hit in answer["hits"]]
    assert [float(row["similarity"]) for row in hits] == [hit["similarity"] for hit in answer["hits"]]
    dangerous = [hit["rank"] - 1 for hit in answer["hits"] if hit["captions"][0] == "=1+1"]
    assert [hits[place]["captions"] for place in dangerous] == ["'=1+1"]
    page.locator("#copy-link").click()
    expect(page.locator("#copy-link")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == page.url


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))


def tab_to(page: Page, wanted: str) -> None:
    """Press Tab until a control has the focus."""
    for _ in range(80):
        if focused(page) == wanted:
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab never comes to {wanted}")


def test_everything_is_reached_by_the_keyboard(page: Page) -> None:
    page.goto("/")
    page.locator(".queries a").first.wait_for()
    page.keyboard.press("Tab")
    assert focused(page) == "skip"
    assert page.locator("#skip").bounding_box()["y"] >= 0  # type: ignore[index]
    for each in ("Versions", "file", "caption", "ask"):
        tab_to(page, each)
        outline = "getComputedStyle(document.activeElement.type === 'file' ? document.querySelector('.drop .mat')"
        assert page.evaluate(f"{outline} : document.activeElement).outlineStyle") != "none"
    while not page.evaluate("document.activeElement.matches('.queries a')"):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    shown(page)
    first = page.locator("#raised .card button").first.get_attribute("id")
    assert first is not None
    tab_to(page, first)
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog.locator("#search-by-this")).to_be_visible()
    for _ in range(6):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('dialog') || document.activeElement === document.body")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert focused(page) == first


def test_controls_have_names_and_pictures_have_texts(page: Page) -> None:
    nameless = """() => {
      const all = document.querySelectorAll('button, a, input, select, summary, dialog[open]');
      return [...all].filter((each) => {
        const labels = [...(each.labels ?? [])].map((label) => label.textContent).join('');
        const by = document.getElementById(each.getAttribute('aria-labelledby'))?.textContent;
        return !(each.getAttribute('aria-label') || by || labels.trim() || each.textContent.trim());
      }).map((each) => each.outerHTML);
    }"""
    for place in PLACES[:5]:
        visit(page, place)
        assert page.evaluate(nameless) == []
        assert page.locator("img:not([alt]), img[alt='']").count() == 0
        assert page.locator("h1").count() == 1
        assert page.evaluate("document.title").endswith("FastGDA")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_every_page_without_scrolling_sideways(chromium: Browser, url: str, scheme: Any) -> None:
    context = chromium.new_context(base_url=url, viewport=PHONE, color_scheme=scheme, reduced_motion="reduce")
    page = context.new_page()
    for place in PLACES:
        visit(page, place)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], place
        assert page.evaluate("document.querySelector('dialog').scrollWidth") <= PHONE["width"], place
    # Dark is dark: the ground is darker than what stands on it.
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 3 * 128) == (scheme == "dark")
    context.close()


def test_tiers_are_switched_and_stand_side_by_side(page: Page, url: str) -> None:
    fast, sketch = (asked(url, query_id="s0003", tier=tier)["hits"] for tier in ("fast", "sketch"))
    page.goto("/#/?query=s0003")
    assert shown(page) == captions(fast)
    page.locator("#tier-fast").focus()
    page.keyboard.press("ArrowRight")
    page.locator(".plate .tier-name", has_text="Sketch").wait_for()
    assert "tier=sketch" in page.url and shown(page) == captions(sketch)
    assert page.evaluate("document.activeElement.id") == "tier-sketch"
    expect(page.locator("#raised .facts").first).to_contain_text("±")
    page.locator("#k").select_option("12")
    page.locator("#beside").select_option("fast")
    expect(page.locator(".column")).to_have_count(2)
    fast, sketch = (asked(url, query_id="s0003", tier=tier, k=12)["hits"] for tier in ("fast", "sketch"))
    assert shown(page, ".column:nth-of-type(1)") == captions(sketch)
    assert shown(page, ".column:nth-of-type(2)") == captions(fast)
    both = {hit["train_id"] for hit in fast} & {hit["train_id"] for hit in sketch}
    expect(page.locator(".column:nth-of-type(1) .both")).to_have_count(len(both))
    expect(page.locator("#overlap")).to_have_text(
        f"{len(both)} of the {len(sketch)} images on the left are on the right as well."
    )


def test_all_ways_stand_in_columns_and_mark_what_the_chosen_tier_names(page: Page, url: str) -> None:
    answer = asked(url, query_id="s0003", k=12, beside=True)
    visit(page, "#/?query=s0003&k=12&beside=all")
    expect(page.locator(".way h3")).to_have_text(["Fast", "Sketch", "Exact", "Images"])
    fast = {hit["train_id"]: hit["rank"] for hit in answer["hits"]}
    for column in answer["beside"]:
        place = f"#way-{column['way']}"
        assert shown(page, place) == captions(column["hits"])
        both = [fast[hit["train_id"]] for hit in column["hits"] if hit["train_id"] in fast]
        expect(page.locator(f"{place} .shares")).to_have_text(f"{len(both)} of 12 as Fast")
        expect(page.locator(f"{place} .both .also")).to_have_text([f"Fast: {rank}" for rank in both])
        agreement = column["agreement"]
        said = "not measured" if agreement["value"] is None else f"{agreement['measure']} {agreement['value']:.1g}"[:-1]
        expect(page.locator(f"{place} header")).to_contain_text(said)
    named = [
        sum(hit["train_id"] in {n["train_id"] for n in c["hits"]} for c in answer["beside"]) for hit in answer["hits"]
    ]
    expect(page.locator("#way-fast .both .also")).to_have_text([f"in {count} of 3" for count in named if count])
    page.locator("#way-sketch button").first.hover()
    shared = answer["beside"][0]["hits"][0]["train_id"]
    expect(page.locator(".same")).to_have_count(page.locator(f"[data-sample='{shared}']").count())
    page.locator("#way-sketch button").first.click()
    page.locator("dialog dl").wait_for()
    assert f"open={shared}" in page.url and "beside=all" in page.url
    with page.expect_download() as told:
        page.keyboard.press("Escape")
        page.locator("#download-csv").click()
    rows = list(csv.DictReader(io.StringIO(told.value.path().read_text())))
    beside = [int(row["train_id"]) for row in rows if row["section"] == "beside sketch"]
    assert beside == [hit["train_id"] for hit in answer["beside"][0]["hits"]]


def test_the_teacher_is_asked_by_a_button_and_its_answer_comes_while_one_looks_elsewhere(page: Page, url: str) -> None:
    page.goto("/#/?query=s0003&tier=exact")
    page.locator("#start-exact").click()
    page.locator("progress, #raised").first.wait_for()
    page.locator("nav a", has_text="Versions").click()
    page.locator(".versions").wait_for()
    page.wait_for_timeout(3000)  # the answer comes meanwhile
    page.go_back()
    found = shown(page)
    expect(page.locator(".plate .tier-name")).to_have_text("Exact")
    assert len(found) == SAMPLES


def test_filters_are_conditions_in_the_address(page: Page, url: str) -> None:
    page.goto("/#/?query=s0003")
    page.locator("#filters").click()
    page.locator("#filter-column").select_option("creator")
    page.locator("#filter-value").fill("O'Hara")
    page.locator("#filter-add").click()
    expect(page.locator(".chips code")).to_have_text("\"creator\" = 'O''Hara'")
    expected = asked(url, query_id="s0003", where="creator = 'O''Hara'")["hits"]
    expect(page.locator("#raised .card")).to_have_count(len(expected))
    assert shown(page) == captions(expected) and {hit["metadata"]["creator"] for hit in expected} == {"O'Hara"}
    page.locator("#filter-column").select_option("year")
    page.locator("#filter-operator").select_option(">=")
    page.locator("#filter-value").fill("2010")
    page.locator("#filter-value").press("Enter")
    expect(page.locator(".chips code").nth(1)).to_have_text(re.compile("\"year\" >= '?2010'?"))
    expected = asked(url, query_id="s0003", where="creator = 'O''Hara' and year >= 2010")["hits"]
    expect(page.locator("#raised .card")).to_have_count(len(expected))
    page.reload()
    assert shown(page) == captions(expected)
    page.locator("#filter-column").select_option("made in")
    page.locator("#filter-operator").select_option("<>")
    page.locator("#filter-value").fill("Ulm")
    page.locator("#filter-add").click()
    expect(page.locator("#raised .empty")).to_contain_text("No training image is left")
    page.get_by_role("button", name='Remove the filter "creator"').click()
    expect(page.locator(".chips code")).to_have_count(2)
    page.goto("/#/?query=s0003")
    page.locator("#filters").click()
    page.locator("#filter-column").select_option("group")
    page.locator("#filter-operator").select_option("contains")
    page.locator("#filter-value").fill("gROUP 1")
    page.locator("#filter-add").click()
    expect(page.locator("#raised .card")).to_have_count(SAMPLES // 2)


def test_an_image_leads_to_the_queries_that_it_influenced(page: Page, url: str) -> None:
    facts = httpx.get(f"{url}/v1/samples/4").json()
    assert facts["influenced"]
    page.goto("/#/?query=s0003&open=4")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text(facts["metadata"]["creator"])
    expect(dialog.locator(".queries .card")).to_have_count(len(facts["influenced"]))
    dialog.locator(".queries a").first.click()
    expect(dialog).to_be_hidden()
    assert shown(page) and f"query={facts['influenced'][0]['query_id']}" in page.url


def test_shares_say_what_is_proven(page: Page, url: str) -> None:
    page.goto("/#/shares")
    page.locator("table.shares").wait_for()
    page.locator("#by").select_option("creator")
    page.locator("table.shares thead th", has_text="creator").wait_for()
    answer = httpx.post(f"{url}/v1/shares", json={"by": "creator"}).json()
    rows = page.locator("table.shares tbody tr")
    assert rows.locator("th span:first-child").all_inner_texts() == [row["payee"] for row in answer["rows"]]
    unproven = [not row["proven"] for row in answer["rows"]]
    assert [rows.nth(place).locator(".mark").count() == 1 for place in range(rows.count())] == unproven
    assert rows.locator("rect.unproven").count() == sum(unproven)
    first = answer["rows"][0]
    expect(rows.first).to_contain_text(f"{100 * first['share']:.1f} %")
    with page.expect_download() as waiting:
        page.locator("#download-csv").click()
    kept = list(csv.DictReader(io.StringIO(waiting.value.path().read_text())))
    assert [float(row["share"]) for row in kept] == [row["share"] for row in answer["rows"]]
    page.goto("/#/?query=s0003")
    page.locator("#shares-of").click()
    expect(page.locator("#share-summary")).to_contain_text("over 1 query")


def test_a_picture_of_ones_own_has_its_shares(page: Page, chromium: Browser, url: str) -> None:
    page.goto("/")
    page.locator("#file").set_input_files({"name": "x.jpg", "mimeType": "image/jpeg", "buffer": picture(5)})
    page.locator("#caption").fill("a red circle")
    page.locator("#ask").click()
    page.locator("#tier-sketch").check()
    page.locator(".plate .tier-name", has_text="Sketch").wait_for()
    page.locator("#shares-of").click()
    page.locator("#by").select_option("creator")
    body = {"image": base64.b64encode(picture(5)).decode(), "caption": "a red circle", "tier": "sketch"}
    expected = httpx.post(f"{url}/v1/shares", json={**body, "by": "creator"}).raise_for_status().json()["rows"]
    expect(page.locator("table.shares tbody th > span:first-child")).to_have_text([row["payee"] for row in expected])
    expect(page.locator(".alone")).to_contain_text("a red circle")
    page.reload()
    expect(page.locator("table.shares tbody tr")).to_have_count(len(expected))
    elsewhere = chromium.new_page()
    elsewhere.goto(page.url)
    expect(elsewhere.locator("main")).to_contain_text("a picture that it does not hold")
    elsewhere.close()
    page.locator(".alone button").click()
    page.locator("#of").wait_for()
    assert "upload" not in page.url and "caption" not in page.url


def test_queries_are_browsed_by_split_and_by_page(page: Page, url: str) -> None:
    total = httpx.get(f"{url}/v1/queries").json()["total"]
    page.goto("/#/queries")
    expect(page.locator(".queries .card")).to_have_count(total)
    page.locator("#split").select_option("test")
    expect(page.locator(".queries .card")).to_have_count(2)
    assert "split=test" in page.url
    page.reload()
    expect(page.locator("#split")).to_have_value("test")
    page.goto("/#/queries?split=test&offset=40")
    expect(page.locator("main")).to_contain_text("No query")


def test_versions_say_which_one_is_served(page: Page, url: str) -> None:
    page.goto("/#/versions")
    (served,) = (each["version"] for each in httpx.get(f"{url}/v1/indexes").json()["indexes"] if each["served"])
    expect(page.locator(".versions .served")).to_contain_text(served[:10])


def test_an_error_is_one_readable_line(chromium: Browser, url: str) -> None:
    page = chromium.new_page(base_url=url)
    page.goto("/#/?query=nobody")
    expect(page.get_by_role("alert")).to_contain_text("no query nobody")
    page.goto("/#/?query=s0003&open=999999")
    expect(page.get_by_role("alert")).to_contain_text("999999")
    page.route("**/v1/**", lambda route: route.abort())
    page.goto("/#/queries")
    expect(page.get_by_role("alert")).to_contain_text("The service does not answer")
    page.unroute("**/v1/**")
    page.locator("#again").click()
    page.locator(".queries a").first.wait_for()
    page.close()


def test_a_service_with_keys_is_asked_with_the_key_that_was_given(
    chromium: Browser, settings: ServiceSettings, tmp_path: Path
) -> None:
    token = add_key(tmp_path / "keys.json", "reader", "read")
    with browsers.service(settings.model_copy(update={"keys": str(tmp_path / "keys.json")})) as url:
        page = chromium.new_page(base_url=url)
        page.goto("/#/?query=s0003")
        page.locator("#key").fill(token)
        page.locator("#key").press("Enter")
        assert shown(page)
        image = page.locator("#raised .card img").first
        expect(image).to_have_attribute("src", re.compile("^blob:"))  # until it is fetched there is nothing to decode
        image.evaluate("(image) => image.decode()")
        page.reload()
        assert shown(page)
        page.close()
