"""Dates as Python writes them, on Linux: what `strftime_now` of a chat template gives.

    python tests/golden/strftime.py
"""

import json
import pathlib
import platform
from datetime import datetime

# Years from 1970 on; leap days, ends of years, weeks that belong to the year before or after, hours around noon.
TIMES = [
    "1970-01-01T00:00:00.000000",
    "2000-02-29T00:30:09.000007",
    "2005-01-02T12:05:00.000000",
    "2012-12-30T11:59:59.999999",
    "2024-12-31T23:59:59.123456",
    "2026-07-05T13:01:02.000000",
]
# Not %s, which depends on the time zone of the machine.
LETTERS = "aAbBcCdDeEfFgGhHIjJkKlLmMnNopPqQrRStTuUvVwWxXyYzZ%"
FORMATS = [f"%{letter}" for letter in LETTERS] + [
    "%d %b %Y",
    "%-d. %B %Y, %-I:%M %p",
    "Today is %A, %-m/%-d/%y.",
    "%_d|%_H|%_m|%_j|%0e|%0k",
    "%^a %^A %^b %^B %^p %^h",
    "%#a %#A %#b %#B %#p %#h",
    "%5d|%5a|%05a|%_5d|%10B|%3Y|%6Y",
    "%-H:%-M:%-S %-j %-y",
    "%Ey %EY %Od %OH %Ec",
    "%-q %Q %5q",
    "100 %",
    "%",
    "%-",
    "%%d %%%d",
    "%H:%M:%S.%f",
    "é %d 😀 %b",
    "",
    "no percent",
    "%G-W%V-%u %U %W",
    "%-Y %-C %-G %-V",
    "%^c|%^x|%^r",
    "%20F|%020T|%12D",
    "%e.%m.%k:%l",
    "%5%|%n%t|",
    "%d\n%m",
    "%_y%_I%_M",
    "%5n|",
    "%3w%3u",
    "%^P|%#P",
    "%z%Z|%5Z|%-z",
    "%i",
    "%1",
    "%O",
    "%E%",
    "%^",
    "%#",
    "%_e %-e",
    "%-k %-l",
    "%:z",
]


def main():
    asked = [(time, text) for time in TIMES for text in FORMATS]
    asked += [(TIMES[1], f"%{modifier}{letter}") for modifier in "EO" for letter in LETTERS if letter != "f"]
    cases = [(time, text, datetime.fromisoformat(time).strftime(text)) for time, text in asked]
    golden = {"made_with": {"python": platform.python_version(), "libc": " ".join(platform.libc_ver())}, "cases": cases}
    path = pathlib.Path(__file__).with_suffix(".json")
    lines = ",\n".join("  " + json.dumps(case, ensure_ascii=False) for case in cases)
    head = json.dumps(golden["made_with"])
    path.write_text(f'{{\n "made_with": {head},\n "cases": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    print(len(cases), "cases")


if __name__ == "__main__":
    main()
