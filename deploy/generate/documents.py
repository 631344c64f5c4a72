"""Documents as YAML: in the order they were written, long texts as they are read."""

from typing import Any, Final

import yaml

HEADER: Final = "# Made by `make generate` from {source}; edit that.\n"


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such, and nothing twice by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def as_yaml(document: dict[str, Any], source: str) -> str:
    """The document, below a comment that says from which module of the repository it comes."""
    body = yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=4096)
    return HEADER.format(source=source) + body
