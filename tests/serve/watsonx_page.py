"""Does the tutorial in the page of a running `gneiss watsonx` with headless Chromium: upload, tune, watch, deploy, score, try.

    watsonx_page.py URL --key KEY --train train.json [--shots DIR]

The server's profile is one by which its model learns the examples. Screenshots go to DIR, to be looked at.
"""

import argparse
import csv
import gzip
import io
import json
import pathlib
import re
import tempfile

from page import ARGUMENTS, CHROMIUM, LOOKS, Server, visit
from playwright.sync_api import expect, sync_playwright

NAME = "reviews <b>of dogs</b>"
PARQUET = pathlib.Path(__file__).resolve().parent.parent / "fixtures" / "datasets" / "dictionary.parquet"
EPOCHS = 12
# Milliseconds that a run may take, on a busy machine.
PATIENCE = 300_000


def check_upload(page, train):
    expect(page.locator("#no-assets")).to_be_visible()
    page.click("#upload-button")
    expect(page.locator("#notice")).to_have_text("Choose a file first.")
    page.click("#start-button")
    expect(page.locator("#refusal")).to_have_text("Upload a file with examples first.")
    page.set_input_files("#file", train)
    page.click("#upload-button")
    expect(page.locator("#assets .name")).to_have_text(train.name)
    expect(page.locator("#data option")).to_have_text([train.name])


def check_run(visit):
    page = visit.page
    page.fill("#num-epochs", "0")
    page.click("#start-button")
    expect(page.locator("#refusal")).to_contain_text("Epochs:")
    page.fill("#num-epochs", str(EPOCHS))
    page.fill("#name", NAME)
    names = page.locator("#model option").all_text_contents()
    page.select_option("#model", names[-1])
    expect(page.locator("#stand-in")).to_contain_text("stands in")
    page.click("#start-button")
    expect(page.locator("#run-name")).to_have_text(NAME)
    expect(page.locator("#runs .state")).to_have_text(re.compile("pending|running|storing|completed"))
    expect(page.locator("#plot svg")).to_be_visible()
    visit.shot("running")
    expect(page.locator("#run-state")).to_have_text("completed", timeout=PATIENCE)
    expect(page.locator("#progress .number")).to_contain_text(f"epoch {EPOCHS} of {EPOCHS}")
    expect(page.locator("#plot .dot")).to_have_count(EPOCHS)
    expect(page.locator("#warnings li").first).to_contain_text("stands in")
    expect(page.locator("#warnings")).to_contain_text("learning_rate")
    box = page.locator("#plot svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 13, box["y"] + 50)
    expect(page.locator("#readout")).to_contain_text(f"epoch {EPOCHS}:")


def check_cancel(page):
    """A second run is ended, and deleted."""
    page.fill("#name", "short")
    page.fill("#num-epochs", "100000")
    page.click("#start-button")
    expect(page.locator("#run-name")).to_have_text("short")
    page.click("#cancel")
    expect(page.locator("#run-state")).to_have_text("canceled")
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("#delete-run")
    expect(page.locator("#runs li")).to_have_count(1)
    expect(page.locator("#run-name")).to_have_text(NAME)


def check_deployment(visit):
    page = visit.page
    for count, name in enumerate(["first", "first"], 1):
        page.fill("#deploy-name", name)
        page.click("#deploy button")
        expect(page.locator("#deployments .state")).to_have_text(["ready"] * count)
    expect(page.locator("#deployments .note").first).to_contain_text("first_2")
    page.once("dialog", lambda dialog: dialog.accept())
    page.locator("#deployments").get_by_role("button", name="Delete first").first.click()
    expect(page.locator("#deployments li")).to_have_count(1)
    page.locator("#deployments").get_by_role("link", name="Try first").click()
    expect(page.locator("#prompt")).to_have_value("first")
    expect(page.locator("nav a[aria-current]")).to_have_text("Try")
    page.fill("#input", "Comment: visit 1 was very good.\nSatisfaction:\n")
    page.click("#run")
    expect(page.locator(".column.tuned .answer")).to_have_text(re.compile("^[01]$"))
    visit.settle()
    visit.shot("try")
    page.click("nav a:has-text('Tune')")
    expect(page.locator("#run-name")).to_have_text(NAME)


def score(page, name, count):
    page.select_option("#score-data", label=name)
    page.click("#score-button")
    expect(page.locator("#scores")).to_contain_text(f"Examples{count}")
    return [float(text.split()[0]) for text in page.locator("#scores strong").all_text_contents()[:2]]


def upload(page, path):
    page.set_input_files("#file", path)
    page.click("#upload-button")
    expect(page.locator("#assets .name").first).to_have_text(path.name)


def delete_data(page, name):
    page.once("dialog", lambda dialog: dialog.accept())
    page.locator("#assets").get_by_role("button", name=f"Delete {name}", exact=True).click()
    expect(page.locator("#score-data option").filter(has_text=re.compile(f"^{re.escape(name)}$"))).to_have_count(0)


def check_scores(visit, train):
    """Scores on the prompt's own examples, some of them, none; in several formats; and what can't be scored."""
    page, note = visit.page, visit.page.locator("#score-note")
    tuned, base = score(page, train.name, 48)
    assert tuned >= 50 > base, f"expected a tuned prompt that has learned from the examples, found {tuned} % and {base} %"
    expect(note).to_contain_text("was tuned on these examples")
    rows = json.loads(train.read_text())
    new = [{"input": f"Comment: \"new\", visit {i}\nwas very good.\nSatisfaction:\n", "output": "1"} for i in range(6)]
    with tempfile.TemporaryDirectory() as folder:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, ["input", "output"])
        writer.writeheader()
        writer.writerows(rows[:4] + new)
        some, none, broken = (pathlib.Path(folder) / name for name in ("some.csv.gz", "none.jsonl", "broken.csv"))
        some.write_bytes(gzip.compress(table.getvalue().encode()))
        none.write_text("".join(json.dumps(row) + "\n" for row in new))
        broken.write_bytes(b"PK\x03\x04 a zip archive")
        for path in (some, none, PARQUET, broken):
            upload(page, path)
    score(page, some.name, 10)
    expect(note).to_contain_text("was tuned on 4 of these 10 examples")
    score(page, none.name, 6)
    expect(note).to_be_hidden()
    assert score(page, PARQUET.name, 3) == [0, 0]
    page.select_option("#score-data", label=broken.name)
    page.click("#score-button")
    expect(page.locator("#score-refusal")).to_contain_text(f"{broken.name}: the file is a zip archive")
    expect(page.locator("#scores")).to_be_hidden()
    visit.shot("not-scored")
    for path in (some, none, PARQUET, broken):
        delete_data(page, path.name)


def check_deleted_data(page, train):
    """The prompt's own examples are gone: whether others are among them can't be said."""
    delete_data(page, train.name)
    upload(page, train)
    score(page, train.name, 48)
    expect(page.locator("#score-refusal")).to_be_empty()
    expect(page.locator("#score-note")).to_contain_text("It is not known")


def check_failures(page):
    page.route("**/ml/v4/trainings", lambda route: route.abort("connectionrefused"))
    page.evaluate("dispatchEvent(new Event('focus'))")
    expect(page.locator("#health")).to_have_text("no answer")
    expect(page.locator("#notice")).to_contain_text("Is it still running?")
    page.unroute("**/ml/v4/trainings")
    page.evaluate("dispatchEvent(new Event('focus'))")
    expect(page.locator("#health")).to_have_text("ready")
    expect(page.locator("#notice")).to_be_hidden()
    assert page.locator("b").count() == 0, "a name became markup"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--key")
    parser.add_argument("--train", type=pathlib.Path, required=True)
    parser.add_argument("--shots", type=pathlib.Path)
    options = parser.parse_args()
    server = Server(options.url, options.key)
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        with visit(browser, server, options.shots, refusals=2) as clicks:
            clicks.open()
            clicks.shot("empty")
            check_upload(clicks.page, options.train)
            check_run(clicks)
            check_cancel(clicks.page)
            check_deployment(clicks)
            check_scores(clicks, options.train)
            check_failures(clicks.page)
        for name, width, height, dark in LOOKS:
            with visit(browser, server, options.shots, width=width, height=height, dark=dark) as look:
                look.open()
                expect(look.page.locator("#plot svg")).to_be_visible()
                score(look.page, options.train.name, 48)
                look.shot(f"tune-{name}")
                look.fits()
        with visit(browser, server, options.shots, refusals=1) as late:
            late.open()
            check_deleted_data(late.page, options.train)
        browser.close()
    print(f"{options.url}: the page holds")


if __name__ == "__main__":
    main()
