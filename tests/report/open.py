"""Opens pages in headless Chromium as a reader would, and fails on what a reader should not meet.

    open.py OUT PAGE...

For each page: no error or warning on the console, no exception, no request but the file's own, nothing wider than
a phone (360 pixels), every picture named, and letters in pictures at least 9 pixels high on a phone. Screenshots go to
OUT: NAME-light.png, NAME-dark.png, NAME-phone.png, NAME-print.png and NAME.pdf.
"""

import pathlib
import sys

from playwright.sync_api import sync_playwright

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-sync",
    "--no-first-run",
    "--disable-component-update",
    "--disable-quic",
]
# (name, width, height, dark, print)
LOOKS = [
    ("light", 1280, 900, False, False),
    ("dark", 1280, 900, True, False),
    ("phone", 360, 740, False, False),
    ("print", 794, 1123, True, True),
]

# Pictures without a name, among those that are shown.
UNNAMED = """() => [...document.querySelectorAll('svg, img, [role=img]')]
  .filter(e => !(e.getAttribute('aria-label') || e.getAttribute('alt')))
  .map(e => e.outerHTML.slice(0, 120))"""
WIDE = """() => {
  const width = document.documentElement.clientWidth;
  const over = [...document.querySelectorAll('body *')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width > 0 && box.right > width + 1 && !e.closest('.scroll, pre') && !e.closest('svg');
  });
  return [document.documentElement.scrollWidth, width, over.slice(0, 3).map(e => e.outerHTML.slice(0, 160))];
}"""
# In print nothing scrolls: what is wider than its box is cut off.
CUT = """() => [...document.querySelectorAll('.scroll, pre')]
  .filter(e => e.getBoundingClientRect().width > 0 && e.scrollWidth > e.clientWidth + 1)
  .map(e => e.scrollWidth + ' > ' + e.clientWidth + ': ' + e.outerHTML.slice(0, 160))"""
FOLDED = """() => [...document.querySelectorAll('details')]
  .flatMap(d => [...d.children].filter(e => e.tagName != 'SUMMARY' && !e.checkVisibility()))
  .map(e => e.outerHTML.slice(0, 120))"""
SMALLEST = """() => Math.min(...[...document.querySelectorAll('svg text')]
  .filter(e => e.getBoundingClientRect().width > 0)
  .map(e => parseFloat(e.getAttribute('font-size')) * e.getScreenCTM().a))"""
# Texts of a picture that lie over each other, or beyond its edge.
CROWDED = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].map(e => [e.textContent.trim(), e.getBoundingClientRect()])
    .filter(([, box]) => box.width > 0);
  const beyond = texts.filter(([, b]) => b.left < frame.left || b.right > frame.right + 1 || b.bottom > frame.bottom + 1);
  const over = texts.flatMap(([t, a], i) => texts.slice(i + 1)
    .filter(([, b]) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2)
    .map(([u]) => t + ' / ' + u));
  return [...beyond.map(([t]) => t + ' (edge)'), ...over];
})"""


def check(page, problems, name, look, width, printed):
    def expect(holds, what):
        if not holds:
            problems.append(f"{name}, {look}: {what}")

    unnamed = page.evaluate(UNNAMED)
    expect(not unnamed, f"expected a name on every picture, found none on {unnamed}")
    scroll_width, client_width, over = page.evaluate(WIDE)
    expect(scroll_width <= client_width, f"expected at most {client_width} pixels across, found {scroll_width}: {over}")
    expect(not over, f"expected nothing beyond {client_width} pixels, found {over}")
    crowded = page.evaluate(CROWDED)
    expect(not crowded, f"expected texts of pictures apart, found {crowded}")
    if width == 360:
        smallest = page.evaluate(SMALLEST)
        expect(smallest >= 9, f"expected letters of 9 pixels in pictures, found {smallest:.1f}")
    if printed:
        cut = page.evaluate(CUT)
        expect(not cut, f"expected nothing cut off, found {cut}")
        folded = page.evaluate(FOLDED)
        expect(not folded, f"expected everything unfolded, found hidden {folded}")


def open_page(browser, path, out, problems):
    for scale in (1, 2):
        context = browser.new_context(device_scale_factor=scale)
        page = context.new_page()
        listen(page, path, problems)
        page.goto(path.resolve().as_uri())
        for look, width, height, dark, printed in LOOKS:
            if scale == (2 if width == 360 else 1):
                page.set_viewport_size({"width": width, "height": height})
                page.emulate_media(media="print" if printed else "screen", color_scheme="dark" if dark else "light")
                check(page, problems, path.stem, look, width, printed)
                # Chromium takes no picture of more than 16,384 pixels.
                tall = min(page.evaluate("document.documentElement.scrollHeight"), 8000)
                page.set_viewport_size({"width": width, "height": tall})
                page.screenshot(path=out / f"{path.stem}-{look}.png")
        if scale == 1:
            page.pdf(path=out / f"{path.stem}.pdf", format="A4", print_background=True, prefer_css_page_size=True)
        context.close()


def listen(page, path, problems):
    url, name = path.resolve().as_uri(), path.stem

    def said(message):
        if message.type in ("error", "warning"):
            problems.append(f"{name}: console {message.type}: {message.text}")

    def asked(request):
        if request.url != url and not request.url.startswith("data:"):
            problems.append(f"{name}: asked for {request.url}")

    def spoke(dialog):
        problems.append(f"{name}: a dialog: {dialog.message}")
        dialog.dismiss()

    page.on("console", said)
    page.on("pageerror", lambda error: problems.append(f"{name}: {error}"))
    page.on("dialog", spoke)
    page.on("request", asked)


def main():
    out, pages = pathlib.Path(sys.argv[1]), [pathlib.Path(p) for p in sys.argv[2:]]
    out.mkdir(parents=True, exist_ok=True)
    problems = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        for path in pages:
            open_page(browser, path, out, problems)
        browser.close()
    for problem in problems:
        print(problem)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
