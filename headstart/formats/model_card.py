"""The text of the model card of heads: what they are, for which target, how to use them. Must not read or write files."""

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

{parameters:,} parameters that draft the next tokens of {name} ({architecture}, {layers} layers, hidden size {hidden},
vocabulary {vocab}). Headstart lets the model verify the drafts: under its default rule the text is that of the model alone, and
it is faster where many drafts are accepted. How many depends on how close the model is to the one that these heads were trained
for{digest}.
The heads work with a fine-tune of it too; fewer drafts are accepted then.

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
    """The text of `README.md` for heads.

    described: their description.
    parameters: number of their parameters.
    """
    target, option = described.target, model_option(described.target.name)
    return CARD.format(
        **target.model_dump(exclude={"digest", "tokenizer"}),
        digest="" if target.digest is None else f"; they were saved for\nweights with the digest {target.digest}",
        method=described.method,
        model=option,
        where=f", and `{target.name}` may need the path at which you keep that model" if option else "",
        parameters=parameters,
        settings=_list(described.settings),
        training=_list(described.training) if described.training else "Nothing was recorded.",
    )


def with_section(text: str, title: str, body: str) -> str:
    """A card with a section of this title at its end, in place of one of the same title.

    text: the card.
    body: the section, without its title.
    """
    rest = re.sub(rf"\n## {re.escape(title)}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL)
    return f"{rest.rstrip()}\n\n## {title}\n\n{body.strip()}\n"


def _list(values: dict[str, object]) -> str:
    return "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in values.items())
