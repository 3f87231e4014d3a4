"""The model card beside heads: what they are, for which target, how to use them. Plain text; knows no files."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from headstart.formats.target_info import model_option

if TYPE_CHECKING:
    from headstart.formats.description import Description

CARD = """---
base_model: {name}
library_name: headstart
tags:
- speculative-decoding
- {method}
---

# {method} heads for {name}

{parameters:,} parameters that guess what {name} ({architecture}, {layers} layers, hidden size {hidden}, vocabulary {vocab})
will say next. Headstart lets the model check the guesses: under its default rule the text is that of the model alone, sooner where
the guesses are often right. How often depends on how close the model is to the one that these heads learned from{digest}.
A fine-tune of it takes them too, with fewer guesses accepted.

```
headstart generate "Once upon a time" {model}--drafter FOLDER
```

where FOLDER is this folder{where}.

## Settings

{settings}

## Training

{training}
"""


def card(described: Description, parameters: int) -> str:
    """The text of `README.md`. parameters: how many numbers the heads have."""
    target, option = described.target, model_option(described.target.name)
    return CARD.format(
        **target.model_dump(exclude={"digest", "tokenizer"}),
        digest="" if target.digest is None else f"; they were saved for\nweights with the digest {target.digest}",
        method=described.method,
        model=option,
        where=f", and `{target.name}` may need the path at which you keep that model" if option else "",
        parameters=parameters,
        settings=_list(described.settings),
        training=_list(described.training) if described.training else "Nothing was written down.",
    )


def with_section(text: str, title: str, body: str) -> str:
    """A card with a section of that title at its end; one that it had is gone."""
    kept = re.sub(rf"\n## {re.escape(title)}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL)
    return f"{kept.rstrip()}\n\n## {title}\n\n{body.strip()}\n"


def _list(target_info: dict[str, object]) -> str:
    return "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in target_info.items())
