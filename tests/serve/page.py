"""Clicks through the page of a running `gneiss serve` in headless Chromium, as a person would who tries a prompt.

    page.py URL [--key KEY] [--shots DIR]

The server has at least one tuned prompt with a task, examples and labels. What must hold is asserted as it is met;
screenshots go to DIR, to be looked at. Failures of the server are made by the browser (a route that answers in its
place), so that they come when they are called for.
"""

import argparse
import contextlib
import json
import pathlib
import re
import ssl
import sys
import urllib.request

from playwright.sync_api import expect, sync_playwright

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "report"))
from open import ARGUMENTS, CHROMIUM, WIDE  # noqa: E402

# (name, width, height, dark)
LOOKS = [("light", 1280, 900, False), ("dark", 1280, 900, True), ("phone", 360, 740, False)]
# Milliseconds that an answer may take, on a busy machine.
PATIENCE = 120_000
BUSY = {"error": {"message": "17 requests are waiting", "type": "rate_limit_error", "code": None}}
GONE = {"error": {"message": "the model is not there", "type": "invalid_request_error", "code": "model_not_found"}}
# Records each length that the base's answer has.
RECORD = """() => {
  const answer = document.querySelector('.column.base .answer');
  window.lengths = [];
  new MutationObserver(() => window.lengths.push(answer.textContent.length)).observe(answer, { childList: true });
}"""


# A fast server is done before a driver has seen the first piece: the page itself presses Stop as it comes.
STOP = """() => {
  const state = document.querySelector('.column.base .state');
  const observer = new MutationObserver(() => {
    if (state.textContent !== 'streaming') return;
    observer.disconnect();
    document.querySelector('#stop').click();
  });
  observer.observe(state, { childList: true, characterData: true, subtree: true });
}"""


class Server:
    """The server's API, asked without a browser."""

    def __init__(self, url, key):
        self.url, self.key = url.rstrip("/"), key

    def ask(self, path, body=None):
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        context = ssl._create_unverified_context() if self.url.startswith("https") else None
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), context=context) as response:
            return json.load(response)

    def completion(self, model, prompt, max_tokens):
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        return self.ask("/v1/completions", body)["choices"][0]


class Visit:
    """One visit of the page, with what the browser complained of."""

    def __init__(self, browser, server, shots, width=1280, height=900, dark=False):
        self.server, self.shots = server, shots
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", reduced_motion="reduce",
            is_mobile=width == 360, has_touch=width == 360, ignore_https_errors=True,
        )
        self.page = page = self.context.new_page()
        self.complaints, self.refusals = [], 0
        page.set_default_timeout(PATIENCE)
        page.on("console", self.said)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self.asked)

    def said(self, message):
        if "Failed to load resource" in message.text:
            self.refusals += 1  # Chromium says so of every status that is an error
        elif message.type in ("error", "warning"):
            self.complaints.append(f"console {message.type}: {message.text}")

    def asked(self, request):
        if not request.url.startswith((self.server.url + "/", "data:")):
            self.complaints.append(f"asked for {request.url}")

    def open(self):
        response = self.page.goto(self.server.url + "/")
        assert response.ok, response.status
        if self.server.key:
            expect(self.page.locator("#lock-message")).to_contain_text("asks for a key")
            self.shot(f"key-{self.page.viewport_size['width']}")
            self.page.fill("#key", "not " + self.server.key)
            self.page.click("text=Use key")
            expect(self.page.locator("#lock-message")).to_contain_text("without spaces")
            self.page.fill("#key", self.server.key + "x")
            self.page.click("text=Use key")
            expect(self.page.locator("#lock-message")).to_contain_text("does not take this key")
            self.page.fill("#key", self.server.key)
            self.page.click("text=Use key")
        expect(self.page.locator("#health")).to_have_text("ready")
        return response

    def column(self, kind, part):
        return self.page.locator(f".column.{kind} {part}")

    def run(self):
        """Runs what is typed and waits for every answer; the columns keep their size."""
        self.page.click("#run")
        before = self.heights()
        self.settle()
        assert self.heights() == before, f"expected columns of {before} pixels, found {self.heights()}"

    def settle(self):
        expect(self.page.locator("#stop")).to_be_disabled(timeout=PATIENCE)

    def heights(self):
        return self.page.evaluate("[...document.querySelectorAll('.column')].map(e => e.offsetHeight)")

    def shot(self, name):
        if self.shots:
            self.page.screenshot(path=self.shots / f"{name}.png", full_page=True)

    def fits(self):
        found, width, over = self.page.evaluate(WIDE)
        assert found <= width and not over, f"expected {width} pixels across, found {found}: {over}"

    def choose(self, name):
        if self.page.locator("#prompt").is_visible():
            self.page.select_option("#prompt", name)

    def set_tokens(self, count):
        self.page.evaluate("document.getElementById('settings').open = true")
        self.page.fill("#max-tokens", str(count))

    def end(self, refusals):
        assert not self.complaints, self.complaints
        allowed = refusals + (2 if self.server.key else 0)
        assert self.refusals == allowed, f"expected {allowed} failed requests on the console, found {self.refusals}"
        self.context.close()


@contextlib.contextmanager
def visit(browser, server, shots, refusals=0, **look):
    visit = Visit(browser, server, shots, **look)
    yield visit
    visit.end(refusals)


def pick_labelled(tasks):
    for prompt in tasks["tasks"]:
        if prompt["task"] and prompt["task"]["labels"] and prompt["task"]["examples"]:
            return prompt
    sys.exit(f"expected a prompt with labels and examples, found {tasks}")


def check_start(visit, tasks, response):
    page = visit.page
    policy = response.headers.get("content-security-policy", "")
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy, policy
    names = [prompt["model"] for prompt in tasks["tasks"]]
    assert page.locator("#prompt option").all_text_contents() == names
    assert page.locator("#prompt").is_visible() == (len(names) > 1)
    expect(page.locator("#base")).to_have_text(tasks["base"].split("/")[-1])


def check_answers(visit, prompt, base):
    """An example is clicked and run; what is shown is what the API says."""
    page, task = visit.page, prompt["task"]
    visit.choose(prompt["model"])
    chips = page.locator("#examples button")
    assert [text.strip() for text in chips.all_text_contents()] == [text.strip() for text in task["examples"]]
    last = task["examples"][-1]
    chips.last.click()
    expect(page.locator("#input")).to_have_value(last)
    expect(chips.last).to_have_attribute("aria-pressed", "true")
    visit.run()
    text = task["verbalizer"].replace("{{input}}", last)
    instructed = f"{task['hard_prompt']} {text}" if task["hard_prompt"] else text
    for kind, model, sent in [("tuned", prompt["model"], text), ("base", base, instructed)]:
        expected = visit.server.completion(model, sent, task["max_output_tokens"])
        found = visit.column(kind, ".answer").text_content()
        assert found == (expected["text"] or "(nothing)"), f"{kind}: expected {expected}, found {found!r}"
        expect(visit.column(kind, ".state")).to_contain_text("cut at" if expected["finish_reason"] == "length" else "done")
        assert visit.column(kind, ".text").text_content().removeprefix(f"{prompt['virtual_tokens']} virtual tokens ") == sent
        check_labels(visit, kind, {"model": model, "input": last, **({"task": prompt["model"]} if kind == "base" else {})})
        for measure in ("first", "total"):
            assert re.fullmatch(r"[\d,.]+ ms", visit.column(kind, f".{measure}").text_content())
        assert re.fullmatch(r"[\d,]+, \d+", visit.column(kind, ".tokens").text_content())
    expect(page.locator("#verdict strong")).to_have_text(re.compile("^(=Same answer|≠Different answers)$"))
    expect(page.locator("#rows tr")).to_have_count(1)


def check_labels(visit, kind, body):
    labels = visit.server.ask("/v1/classify", body)["labels"]
    bars = visit.column(kind, "[role=meter]")
    shown = {bar.get_attribute("aria-label"): float(bar.get_attribute("aria-valuenow")) for bar in bars.all()}
    assert abs(sum(shown.values()) - 100) < 0.5, shown
    for label in labels:
        expected = 100 * label["probability"]
        assert abs(shown[label["label"]] - expected) < 0.5, f"{kind}: expected {expected} of {label['label']}, found {shown}"
        width = visit.column(kind, f"[role=meter][aria-label={json.dumps(label['label'])}] i").evaluate(
            "e => 100 * e.offsetWidth / e.parentElement.offsetWidth")
        assert abs(width - expected) < 1, f"{kind}: expected a bar of {expected} %, found {width}"


def check_curl(visit, prompt):
    """The commands are JSON that the API takes; copying says that it did."""
    page = visit.page
    visit.column("tuned", ".sent summary").click()
    for part, path in [(".openai", "/v1/completions"), (".watsonx", "/text/generation")]:
        command = visit.column("tuned", part).text_content()
        assert path in command and visit.server.url in command, command
        assert not visit.server.key or visit.server.key not in command, "the key is in the command"
        body = json.loads(command.partition("-d '")[2].removesuffix("'").replace("'\\''", "'"))
        head = prompt["task"]["verbalizer"].partition("{{input}}")[0]
        # A deployment puts the input into its verbalizer itself.
        assert body["prompt"].startswith(head) if "prompt" in body else not body["input"].startswith(head), body
    button = visit.column("tuned", "h4 button").first
    button.click()
    expect(button).to_have_text("Copied")
    visit.column("tuned", ".sent summary").click()
    page.mouse.move(0, 0)


def check_keyboard(visit, prompt):
    page = visit.page
    page.focus("#input")
    page.keyboard.press("Control+a")
    page.keyboard.type(prompt["task"]["examples"][0])
    page.keyboard.press("Control+Enter")
    visit.settle()
    expect(page.locator("#rows tr")).to_have_count(2)
    page.locator("#rows button").last.click()
    expect(page.locator("#input")).to_have_value(prompt["task"]["examples"][-1])
    page.focus("#input")
    page.keyboard.press("Control+a")
    page.keyboard.press("Delete")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#refusal")).to_have_text("Type an input, or pick an example.")
    expect(page.locator("#rows tr")).to_have_count(2)
    page.keyboard.type("<img src=x onerror=alert(1)>")
    expect(page.locator("#refusal")).to_be_empty()
    page.keyboard.press("Control+Enter")
    visit.settle()
    expect(page.locator("#rows tr")).to_have_count(3)
    assert page.locator("img").count() == 0
    visit.set_tokens(0)
    page.click("#run")
    expect(page.locator("#refusal")).to_contain_text("Most tokens of an answer")


def check_stream(visit):
    """A long answer comes piece by piece, and Stop ends it."""
    page = visit.page
    page.fill("#input", "Once upon a time there was a dog")
    visit.set_tokens(32)
    page.evaluate(RECORD)
    visit.run()
    steps = sorted(set(page.evaluate("window.lengths")))
    assert len(steps) >= 4, f"expected an answer in several steps, found lengths {steps}"
    visit.shot("stream")
    rows = page.evaluate("[...document.querySelectorAll('#rows tr')].map(e => e.offsetHeight)")
    assert max(rows) <= 80, f"expected rows of two lines, found {rows} pixels"
    visit.set_tokens(200)
    page.evaluate(STOP)
    page.click("#run")
    expect(visit.column("base", ".state")).to_have_text("stopped")
    stopped = visit.column("base", ".answer").text_content()
    visit.settle()
    page.wait_for_timeout(500)
    assert visit.column("base", ".answer").text_content() == stopped


def check_cancel(visit, prompt):
    """With a server that never answers: Stop ends both requests, and so does a second run."""
    page, held, cut = visit.page, [], []
    page.route("**/v1/completions", lambda route: held.append(route))
    page.on("requestfailed", lambda request: cut.append(request.failure))
    page.fill("#input", prompt["task"]["examples"][0])
    for presses, ended in [("#run", 0), ("#run", 2), ("#stop", 4)]:
        page.click(presses)
        page.wait_for_timeout(200)
        assert cut == ["net::ERR_ABORTED"] * ended, f"expected {ended} requests ended, found {cut}"
    assert len(held) == 4
    for kind in ("base", "tuned"):
        expect(visit.column(kind, ".state")).to_have_text("stopped")
    page.unroute("**/v1/completions")


def check_list(visit, prompt, tasks):
    """A prompt that is loaded meanwhile is in the list when the page is looked at again; nothing else changes."""
    page, late = visit.page, {"model": "<i>late</i>", "virtual_tokens": 1, "task": None}
    page.fill("#input", prompt["task"]["examples"][0])
    visit.set_tokens(2)
    visit.run()
    shown = page.locator("#columns").text_content()
    page.route("**/v1/tasks", lambda route: route.fulfill(json={**tasks, "tasks": [late, *tasks["tasks"]]}))
    page.evaluate("dispatchEvent(new Event('focus'))")
    expect(page.locator("#prompt option").first).to_have_text(late["model"])
    expect(page.locator("#prompt")).to_have_value(prompt["model"])
    expect(page.locator("#input")).to_have_value(prompt["task"]["examples"][0])
    assert page.locator("#columns").text_content() == shown
    page.select_option("#prompt", late["model"])
    expect(visit.column("tuned", "h3")).to_have_text(late["model"])
    expect(page.locator("#task")).to_contain_text("no task.json")
    expect(page.locator("#virtual-tokens")).to_have_text("1 virtual token")
    page.unroute("**/v1/tasks")


def check_failures(visit, prompt, tasks):
    """What the page says of a server that is busy, gone, or has unloaded the prompt."""
    page = visit.page
    busy = {"status": 429, "json": BUSY, "headers": {"retry-after": "3"}}
    page.route("**/v1/completions", lambda route: route.fulfill(**busy))
    page.click("#run")
    expect(visit.column("tuned", ".trouble")).to_have_text("The server is busy; try again in 3 s. 17 requests are waiting")
    visit.settle()
    page.unroute("**/v1/completions")
    page.route("**/v1/completions", lambda route: route.abort("connectionrefused"))
    page.click("#run")
    expect(visit.column("base", ".trouble")).to_contain_text("does not answer")
    expect(page.locator("#health")).to_have_text("no answer")
    visit.settle()
    visit.shot("failed")
    page.unroute("**/v1/completions")
    page.route("**/v1/completions", lambda route: route.fulfill(
        content_type="text/event-stream", body='data: {"choices":[{"index":0,"text":"1"}]}\n\n'))
    page.click("#run")
    expect(visit.column("base", ".trouble")).to_contain_text("broke off")
    visit.settle()
    page.unroute("**/v1/completions")
    left = {**tasks, "tasks": [other for other in tasks["tasks"] if other != prompt]}
    page.route("**/v1/tasks", lambda route: route.fulfill(json=left))
    page.route("**/v1/completions", lambda route: route.fulfill(status=404, json=GONE))
    page.click("#run")
    expect(page.locator("#notice")).to_have_text(f"The prompt {prompt['model']} is not loaded any more.")
    assert page.locator("#prompt option").count() == len(left["tasks"])
    page.unroute("**/v1/completions")
    page.unroute("**/v1/tasks")
    page.evaluate("dispatchEvent(new Event('focus'))")
    expect(page.locator("#prompt option")).to_have_count(len(tasks["tasks"]))


def check_base_alone(visit, tasks):
    page = visit.page

    def without_prompts(route):
        response = route.fetch()
        route.fulfill(response=response, **({"json": {**tasks, "tasks": []}} if response.ok else {}))

    page.route("**/v1/tasks", without_prompts)
    visit.open()
    expect(page.locator("#start-command")).to_have_text(f"gneiss serve --model {tasks['base']} --adapter NAME=DIR")
    expect(page.locator(".column.tuned")).to_be_hidden()
    page.fill("#input", "Once upon a time")
    visit.set_tokens(8)
    visit.run()
    expected = visit.server.completion(tasks["base"], "Once upon a time", 8)["text"]
    assert visit.column("base", ".answer").text_content() == (expected or "(nothing)")
    visit.shot("base-alone")


def check_looks(browser, server, shots, prompt):
    for name, width, height, dark in LOOKS:
        with visit(browser, server, shots, width=width, height=height, dark=dark) as look:
            look.open()
            look.choose(prompt["model"])
            look.shot(f"start-{name}")
            look.fits()
            for example in look.page.locator("#examples button").all()[:3]:
                example.click()
                look.run()
            look.column("tuned", ".sent summary").click()
            look.shot(f"answers-{name}")
            look.fits()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--key")
    parser.add_argument("--shots", type=pathlib.Path)
    options = parser.parse_args()
    if options.shots:
        options.shots.mkdir(parents=True, exist_ok=True)
    server, shots = Server(options.url, options.key), options.shots
    tasks = server.ask("/v1/tasks")
    prompt = pick_labelled(tasks)
    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        with visit(browser, server, shots) as clicks:
            check_start(clicks, tasks, clicks.open())
            check_answers(clicks, prompt, tasks["base"])
            check_curl(clicks, prompt)
            check_keyboard(clicks, prompt)
            check_stream(clicks)
            check_cancel(clicks, prompt)
            check_list(clicks, prompt, tasks)
        with visit(browser, server, shots, refusals=6) as failures:
            failures.open()
            failures.choose(prompt["model"])
            check_failures(failures, prompt, tasks)
        with visit(browser, server, shots) as alone:
            check_base_alone(alone, tasks)
        check_looks(browser, server, shots, prompt)
        browser.close()
    print(f"{options.url}: the page holds")


if __name__ == "__main__":
    main()
