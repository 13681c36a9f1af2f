"""Writes continued_chats.json: conversations whose last message is gone on with, as transformers renders them.

    python tests/golden/continued_chats.py

A case without a text is one that transformers refuses: the template left the message out.
"""

import json
import pathlib

import transformers
from chat_templates import SPECIAL, SYSTEM, TEMPLATES, USER
from transformers.utils.chat_template_utils import render_jinja_template

# Beside two of chat_templates.py's: one that changes the message, one that leaves out all but the user's.
CONTINUED = {name: TEMPLATES[name] for name in ("chatml", "headers")} | {
    "upper": "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}",
    "users": "{% for m in messages if m.role == 'user' %}<u>{{ m.content }}{% endfor %}",
    "trimmed": "{% for m in messages %}[{{ m.role }}] {{ m.content.strip() }}{{ eos_token }}{% endfor %}",
}
BEGUN = ["The answer is", "The answer is ", "  Yes:\n", "", "\u00e9\u20ac\U0001f600 <", "assistant"]


def render(template, messages):
    try:
        texts, _ = render_jinja_template(
            conversations=[messages], chat_template=template, continue_final_message=True, **SPECIAL)
        return {"text": texts[0]}
    except ValueError:
        return {"text": None}


def main():
    cases = []
    for name, template in CONTINUED.items():
        for begun in BEGUN:
            messages = [SYSTEM, USER, {"role": "assistant", "content": begun}]
            cases.append({"template": name, "messages": messages} | render(template, messages))
    cases.append({"template": "users", "messages": [USER]} | render(CONTINUED["users"], [USER]))
    golden = {
        "made_with": {"transformers": transformers.__version__},
        "special_tokens": SPECIAL,
        "templates": CONTINUED,
        "cases": cases,
    }
    path = pathlib.Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
