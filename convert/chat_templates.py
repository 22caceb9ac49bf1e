"""Chat templates of a checkpoint folder -> the template keys of the GGUF.

    read_chat_templates(Path("BlockFFN-3B-SFT"), tokenizer_config)    # {"tokenizer.chat_template": "{% for ..."}

chat_template.jinja wins over chat_template.json, and that over tokenizer_config.json. Named templates come from the two
JSON files and from additional_chat_templates/NAME.jinja (transformers since 4.53).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import Keys

from blockffn.convert.checkpoint import optional_json, read_text
from blockffn.convert.fields import shown
from blockffn.errors import BlockffnError

MORE_TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja


def read_chat_templates(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the template keys of a GGUF. settings: the content of tokenizer_config.json."""
    template, file = settings.get("chat_template"), "tokenizer_config.json"
    if (folder / "chat_template.json").is_file():
        template, file = (
            optional_json(folder / "chat_template.json").get("chat_template", template),
            "chat_template.json",
        )
    named = _named_templates(template, file)
    if (folder / "chat_template.jinja").is_file():
        named["default"] = read_text(folder / "chat_template.jinja")
    for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja")):
        named[path.stem] = read_text(path)
    safe = {"".join(c if c.isascii() and c.isalnum() else "_" for c in name): text for name, text in named.items()}
    values: dict[str, Any] = {
        Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name): text for name, text in safe.items() if name != "default"
    }
    if values:
        values[Keys.Tokenizer.CHAT_TEMPLATES] = sorted(set(safe) - {"default"})
    if "default" in safe:
        values[Keys.Tokenizer.CHAT_TEMPLATE] = safe["default"]
    return values


def _named_templates(template: Any, file: str) -> dict[str, str]:
    """Read a chat_template: one text, or a list of objects with name and template."""
    if template is None:
        return {}
    items = template if isinstance(template, list) else [{"name": "default", "template": template}]
    for item in items:
        good = isinstance(item, dict) and isinstance(item.get("template"), str) and isinstance(item.get("name"), str)
        if not good or not 0 < len(item["name"]) <= 100:
            raise BlockffnError(
                f"{file}: chat_template: expected a string or a list of named templates, found {shown(template)}; "
                "correct the file"
            )
    return {item["name"]: item["template"] for item in items}
