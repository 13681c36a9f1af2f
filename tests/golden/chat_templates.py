"""Writes chat_templates.json: chat templates of our own, in the ways that checkpoints' templates are written, and what
transformers makes of them.

    python tests/golden/chat_templates.py
"""

import json
import pathlib

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

# Each template uses what a family of checkpoints uses, in words of our own.
TEMPLATES = {
    # A default system message, an `if` inside a `for`, concatenation, a generation prompt on a line of its own.
    "chatml": """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|s|>system\\nBe brief.<|e|>\\n' }}
{% endif %}
{{ '<|s|>' + message['role'] + '\\n' + message['content'] + '<|e|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|s|>assistant\\n' }}
{% endif %}
""",
    # Messages taken apart by slices, defaults by `is defined`, `set` with filters, dates, whitespace control.
    "headers": """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{#- The first message may be the system's. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<h>system</h>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: python\\n" }}
{%- endif %}
{{- "Today: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- eos_token }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<h>' + message['role'] + '</h>\\n\\n' + message['content'] | trim + eos_token }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("one call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}" }}
    {%- else %}
        {{- "<h>tool</h>" ~ (message.content if message.content is string else message.content | tojson) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<h>assistant</h>\\n\\n' }}
{%- endif %}
""",
    # A namespace, Python's methods of strings and dicts, `elif`, tests, a macro, JSON with an indent, loop controls.
    "roles": """{%- set ns = namespace(system='', count=0, last=none) %}
{%- macro block(role, text) -%}
<r>{{ role }}</r>{{ text }}<x>
{% endmacro %}
{%- for m in messages if m.role == 'system' %}
{%- set ns.system = ns.system ~ m.content.strip() %}
{%- endfor %}
{%- if ns.system == '' %}
{%- set ns.system = 'Knowledge Cutoff Date: April 2024.' %}
{%- endif %}
{%- if documents %}
{%- set ns.system = ns.system ~ ' Documents: ' ~ documents | tojson(indent=4) %}
{%- endif %}
{{- block('system', ns.system) }}
{%- for message in messages %}
{%- if message.role == 'system' %}{% continue %}{% endif %}
{%- if ns.count >= 4 %}{% break %}{% endif %}
{%- set ns.count = ns.count + 1 %}
{%- if message.role == 'assistant' and '</think>' in message.content %}
{%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
{%- elif message.content.startswith('!') %}
{%- set content = message.content.upper().replace('!', '?') %}
{%- else %}
{%- set content = message.content %}
{%- endif %}
{{- block(message.get('role', 'nobody'), content) }}
{%- set ns.last = message %}
{%- endfor %}
{%- if controls is defined and controls is mapping %}
{%- for key, value in controls.items() %}
{{- key | upper }}={{ value }};{{ '' }}
{%- endfor %}
{%- endif %}
{%- if add_generation_prompt %}<r>assistant</r>{% endif %}
""",
    # Roles that have to alternate, errors, `is`, `not in`, index arithmetic, `loop` and its neighbours.
    "alternating": """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[I] ' + message['content'] + ' [/I]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% if loop.last %}#{{ loop.length }}{% endif %}{% if loop.previtem is defined %}<{{ loop.previtem.role[0] }}{% endif %}{% endfor %}""",
    # Values as Python writes them, JSON of everything, tags that mark what an assistant said.
    "values": """{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- generation %}
{{ message.content }}
{%- endgeneration %}
{%- else %}
{{ message.content }}
{%- endif %}
{%- endfor %}
|{{ true }} {{ false }} {{ none }} {{ 1 }} {{ 1.5 }} {{ undefined_thing }}|
|{{ flag }} {{ nothing }}|
|{{ data | tojson }}|
|{{ data | tojson(indent=2) }}|
|{{ data | tojson(sort_keys=true) }}|
|{{ data | tojson(separators=(',', ':')) }}|
|{{ messages[-1].content | default('x') }} {{ messages | length }} {{ messages | map(attribute='role') | join(',') }}|
|{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ messages[::-1][0].role }}|
|{{ 'a,b'.split(',') | last }} {{ 'x' in 'xyz' }} {{ strftime_now('%Y') | length }} {{ 7 // 2 }} {{ 2 ** 3 }}|
|{{ 'Title case'.title() }} {{ ' s '.strip() ~ '.' }} {{ 'abc'.endswith('c') }} {{ 'abc'.find('c') }}|
""",
    # Line ends of Windows and of old Macs in text, tags, strings and comments; values and escapes keep theirs.
    "line_ends": (
        "{# one\r\ntwo #}\r\n{% for message in messages %}\r\n  {% if true %}\r\n<{{ message.role }}>\r\n"
        "{{ message.content }}\r{{ 'x\r\ny' }}\r\n  {%- endif %}\r\n{% endfor %}\r\n"
        "{{ 'kept \\r\\n ' ~ nothing ~ '\\r' }}\r\r\n{%- set\r\na = 1 -%}\r\n\r\n{{ a }}\n\r{{ carriage }}\r\n"
        "{% if add_generation_prompt %}\r\n<assistant>\r\n{% endif %}\r\n\r\n"
    ),
    "raw": "{% raw %}\r\n{{ x }}\r\n  {% if %}\r\n{% endraw %}\r\nend\n  {%- raw -%} a {%- endraw -%} b\n {% raw %}c{% endraw %}\n{{ messages | length }}",
    "macs": "{% for message in messages %}\r<{{ message.role }}>\r{{ message.content }}\r{% endfor %}\r{%- if true %}\rx{% endif %}\r",
    # A trailing newline and indented tags, which trim_blocks and lstrip_blocks see to.
    "spaces": """  {% if true %}
    kept indent
  {% endif %}

{%+ if true %}x{% endif %}
{% for message in messages %}
  * {{ message.content }}
{% endfor %}

""",
}

SPECIAL = {"bos_token": "<b>", "eos_token": "<e>"}
USER = {"role": "user", "content": "What's \"5 < 6\" & 'é€😀'?"}
ASSISTANT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes.\n"}
SYSTEM = {"role": "system", "content": "  Answer in one word.\n"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "f", "arguments": {"z": 1, "a": ["é", None, True, 1.5, {}], "q": "\"\\\n\u0007"}}}],
}
TOOL = {"role": "tool", "content": "é 5"}
CONVERSATIONS = [
    [USER],
    [SYSTEM, USER],
    [USER, ASSISTANT, {"role": "user", "content": "!again"}],
    [SYSTEM, USER, ASSISTANT, USER, ASSISTANT, USER],
    [USER, CALL, TOOL],
    [ASSISTANT, USER],
]
KWARGS = [
    {},
    {
        "date_string": "1 Jan 2025",
        "controls": {"length": "short", "originality": True, "n": None},
        "flag": True,
        "nothing": None,
        "carriage": "a\r\nb\rc",
        "data": {"b": [1, 2.5, "é<&>'"], "a": {"y": None, "x": True}, "c": [], "d": {}},
    },
]


def render(template, messages, add_generation_prompt, kwargs):
    try:
        texts, _ = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            **SPECIAL,
            **kwargs,
        )
        return {"text": texts[0]}
    except Exception as error:
        return {"error": str(error)}


def main():
    cases = []
    for name, template in TEMPLATES.items():
        for messages in CONVERSATIONS:
            for add_generation_prompt in (True, False):
                for kwargs in KWARGS:
                    # Undefined values have no JSON.
                    if name == "values" and not kwargs:
                        continue
                    case = {"template": name, "messages": messages, "add_generation_prompt": add_generation_prompt, "kwargs": kwargs}
                    cases.append(case | render(template, messages, add_generation_prompt, kwargs))
    golden = {
        "made_with": {"transformers": transformers.__version__},
        "special_tokens": SPECIAL,
        "templates": TEMPLATES,
        "cases": cases,
    }
    path = pathlib.Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
