"""What the package says of itself: licences of all that it carries, and nothing that is not so."""

import re
import tomllib
from pathlib import Path

HOME = Path(__file__).parent.parent
PROJECT = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]


def test_everybody_whose_text_was_learned_from_is_named_in_the_licence_files():
    for file in PROJECT["license-files"]:
        assert (HOME / file).is_file(), file
    card = (HOME / "headstart/embedded/target/README.md").read_text()
    sources = [re.match(r"\*\*(.+?)\*\*", line) for line in card.split("## Licence and data")[1].split("\n- ")[1:]]
    assert len(sources) > 8
    notice = " ".join((HOME / "NOTICE").read_text().split())
    assert [source[1] for source in sources if source[1].removeprefix("databricks-").split(" by ")[0] not in notice] == []
    assert "headstart/embedded/target/ATTRIBUTION.md" in PROJECT["license-files"]
