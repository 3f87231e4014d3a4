"""The HTML page of a benchmark: what it shows, what it leaves out, that it escapes everything, and that it needs no network."""

import copy
import json
import math
import re
import sys
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path

import pytest
from command_line import answer

from headstart.bench import trained_heads
from headstart.bench.html import cards, sentences, values
from headstart.bench.html.series import all_series
from headstart.bench.html_report import check_html, html_page, write_html

SHARES = {"draft": 0.2, "score": 0.6, "verify": 0.1, "commit": 0.05, "host": 0.05}
CARDS = (
    "speed-up", "acceptance", "lengths", "times", "reliability", "reliability-by-drafter", "throughput", "latency", "cost",
    "training",
)  # fmt: skip


def run(name, speed_up, temperature=0.0, **changes):
    """The numbers of a run."""
    numbers = {
        "speed_up": speed_up,
        "interval": [speed_up - 0.25, speed_up + 0.25],
        "tau": 2.5,
        "tau_interval": [2.25, 2.75],
        "tokens_per_second": 100 * speed_up,
        "acceptance": [0.75, 0.5],
        "lengths": [10, 20, 30],
        "token_ms": {"p50": 4.0, "p90": 6.0, "p99": 9.0},
        "time_to_first_token": 0.0321,
    }
    kinds = {kind: numbers | {"num_prompts": 2} for kind in ("stories", "edits")}
    own = {"forward": 1.25, "nodes": 4.0, "decode_speed_up": speed_up, "shares": SHARES, "memory": {"heads": 2e6, "cache": 3e6}}
    words = {"identical": "yes", "splits": [], "is_lossy": False, "is_peer": False}
    return {"run": name, "temperature": temperature, **numbers, **own, **words, "kinds": kinds, **changes}


def example():
    """Results with everything that a page can show."""
    curve = [{"step": step, "tokens": 100 * step, "tau": 1 + step / 10, "held_out_tau": 1 + step / 11} for step in (1, 2, 3)]
    names = ("plain", "lookup", "heads/medusa@chain:2")
    return {
        "model": {"name": "models/talk", "dtype": "float32"},
        "machine": {"cpu": "A Processor", "torch": "2.13", "command": "headstart bench --html report.html"},
        "settings": {"prompts": ["stories", "edits"], "num_prompts": 4, "repeat": 3, "max_tokens": 64, "stop": [], "chat": True},
        "labels": ["padded"],
        "num_samples": 36,
        "clean_share": 0.75,
        "runs": [run("plain", 1.0, acceptance=[], lengths=[60]), run(names[1], 1.5), run(names[2], 0.5)],
        "heads": [
            {"folder": "heads/medusa", "method": "medusa", "parameters": 1234, "megabytes": 0.5, "top1": [0.5], "curve": curve}
        ],
        "concurrency": [
            {"run": name, "temperature": 0.0, "rows": rows, "tokens_per_second": 90.0 * rows, "token_ms": {"p99": 9.0 + rows}}
            for name in names
            for rows in (1, 4)
        ],
        "reliability": [
            reliable(names[1], "lookup", 0.03125),
            *(reliable(names[2], drafter, error) for drafter, error in (("all", 0.0625), ("lookup", 0.125), ("medusa", 0.25))),
        ],
        "cost": {"nodes": [1, 4, 16], "ms": [5.0, 5.5, 8.0], "operating_points": [{"run": "lookup", "nodes": 4.0, "ms": 5.5}]},
    }


def reliable(name, drafter, error):
    """How reliable the chances of a drafter of a run were."""
    bins = [
        {"chance": 0.05, "kept": 0.0625, "count": 80},
        {"chance": 0.5, "kept": 0.25, "count": 8},
        {"chance": 0.9, "kept": 1.0, "count": 7},
    ]
    return {"run": name, "temperature": 0.0, "drafter": drafter, "error": error, "bins": bins}


class Page(HTMLParser):
    """The elements of a page and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_data(self, data):
        self.words += data.split()

    @property
    def text(self):
        return " ".join(self.words)


@pytest.fixture(scope="module")
def page():
    return html_page(example())


@pytest.fixture
def not_drawn(monkeypatch):
    """Leaves the plots empty, which takes no time."""
    monkeypatch.setattr(cards, "to_svg", lambda figure, name: "<svg></svg>")


# -- what is shown --


def test_a_page_shows_every_run_with_its_numbers_and_every_plot(page):
    read = Page(page)
    for words in (
        "lookup",
        "medusa@chain:2",
        "1.50×",
        "1.25 to 1.75",
        "150.0",
        "2.25 to 2.75",
        "32.1",
        "A Processor",
        "bench --html",
    ):
        assert words in read.text, words
    assert [name for name in CARDS if name not in read.ids] == []
    assert "padded The target is widened with zeros" in read.text
    assert "lookup is 1.50× as fast as plain decoding (interval 1.25 to 1.75). 1 run is slower than plain decoding." in read.text


def test_reliability_is_shown_by_run_with_its_error_and_by_drafter_where_several_are_joined(page):
    read = Page(page)
    assert "lookup: 0.031" in read.text
    assert "medusa@chain:2: 0.062" in read.text
    assert "medusa@chain:2 at temperature 0: lookup: 0.125, medusa: 0.250" in read.text


def test_points_of_few_drafts_are_not_drawn():
    assert cards._bins(reliable("lookup", "lookup", 0.0)) == [(0.05, 0.0625), (0.5, 0.25)]


def test_text_in_plots_is_text(page):
    figure = re.search(r'id="speed-up".*?</figure>', page, re.DOTALL)[0]
    drawn = re.findall(r"<text [^>]*>([^<]*)</text>", figure)
    assert {"stories", "edits", "1.50×", "0.50×", "speed-up over plain decoding (×)"} <= {*drawn}


def test_a_page_needs_no_network(page):
    without_names = re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)
    assert re.findall(r"https?:|//\w|@import|url\((?!#)|\bsrc=|<link", without_names) == []


def test_every_color_of_the_plots_is_defined_for_light_and_for_dark_pages(page):
    light, dark = page.split("prefers-color-scheme: dark")
    for name in {*re.findall(r"var\((--[\w-]+)\)", page)} - {"--font", "--mono"}:
        assert f"{name}:" in light, name
        assert f"{name}:" in dark, name
    assert re.findall("#0a0[0-9a-f]{3}", page) == []  # no stand-in is left


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_markers_stand_out_from_their_ground(page, scheme):
    colors = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", page.split("prefers-color-scheme: dark")[scheme]))
    for name, color in colors.items():
        least = 4.5 if name in ("--ink", "--muted", "--accent", "--warn") else 3.0 if name.startswith("--hue") else 1.0
        assert contrast(color, colors["--card"]) >= least, name


def contrast(first, second):
    """The contrast ratio of WCAG 2.1."""
    low, high = sorted(map(luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def luminance(color):
    shares = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return sum(weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_no_two_of_forty_runs_look_the_same():
    looks = all_series({"runs": [run(f"run{number}", 1.0) for number in range(40)]}).values()
    assert len({(look.color, look.marker) for look in looks}) == 41


def test_runs_of_the_same_short_name_are_shown_with_their_folders():
    looks = all_series({"runs": [run("a/medusa", 1.0), run("b/medusa", 1.0), run("c/eagle", 1.0)]})
    assert [look.label for look in looks.values()] == ["plain", "a/medusa", "b/medusa", "eagle"]


@pytest.mark.usefixtures("not_drawn")
def test_each_temperature_has_its_section_and_its_plot():
    result = example()
    result["runs"] += [run(row["run"], row["speed_up"] + 1, temperature=0.7) for row in result["runs"]]
    read = Page(html_page(result))
    assert read.text.count("temperature 0.7") == 1 + 2 + 1 + 4 + 1  # the title, two tables and plots with two panels
    assert "lookup at temperature 0.7 is 2.50× as fast" in read.text


@pytest.mark.usefixtures("not_drawn")
def test_peers_and_lossy_runs_are_labelled():
    result = example()
    result["runs"].append(run("transformers", 0.75, is_peer=True, tau=1.0))
    result["runs"][1]["is_lossy"] = True
    read = Page(html_page(result))
    assert "transformers peer 75.0 0.75× 0.50 to 1.00 yes 1.00 2.25 to 2.75 – – 4.00" in read.text  # its forwards are not timed
    assert "peers Runs marked" in read.text
    assert "lossy The acceptance rule changes" in read.text


@pytest.mark.parametrize(
    ("speed_up", "ends", "words"),
    [
        (2.0, [1.5, 2.5], "lookup is 2.00× as fast as plain decoding (interval 1.50 to 2.50)."),
        (1.05, [0.9, 1.2], "its interval, 0.90 to 1.20, contains 1"),
        (0.8, [0.7, 0.9], "No run is faster than plain decoding; the closest is lookup with 0.80×."),
    ],
)
def test_the_finding_says_whether_a_run_is_faster(speed_up, ends, words):
    result = {"runs": [run("plain", 1.0), run("lookup", speed_up, interval=ends)]}
    assert words in sentences.finding(result, all_series(result))


# -- what is missing --


@pytest.mark.usefixtures("not_drawn")
@pytest.mark.parametrize(
    ("field", "missing"),
    [
        ("acceptance", "acceptance"),
        ("lengths", "lengths"),
        ("shares", "times"),
        ("reliability", "reliability"),
        ("concurrency", "throughput"),
        ("cost", "cost"),
        ("heads", "training"),
    ],
)
def test_a_plot_without_data_is_left_out(field, missing):
    result = example()
    for holder in (result, *result["runs"]):
        holder.pop(field, None)
    ids = Page(html_page(result)).ids
    assert missing not in ids
    assert "speed-up" in ids


@pytest.mark.usefixtures("not_drawn")
@pytest.mark.parametrize(("field", "title"), [("token_ms", "P99"), ("memory", "cache"), ("time_to_first_token", "first token")])
def test_a_column_without_data_is_left_out(field, title):
    result = example()
    assert f">{title}</th>" in html_page(result)
    for holder in chain(result["runs"], *(row["kinds"].values() for row in result["runs"])):
        holder.pop(field, None)
    assert f">{title}</th>" not in html_page(result)


@pytest.mark.usefixtures("not_drawn")
@pytest.mark.parametrize("value", [None, math.nan, math.inf, "fast", True])
def test_a_value_that_is_no_number_is_a_dash(value):
    result = example()
    result["runs"][1]["forward"] = result["runs"][1]["tau"] = value
    assert "nan" not in Page(html_page(result)).words
    assert values.number(result["runs"][1], "forward") is None


def test_the_page_of_a_real_run_has_the_plots_that_its_results_have(model_folder, tmp_path):
    result = answer("bench", "--model", model_folder, "--run", "lookup", "--limit", "2", "--max-tokens", "16", "--repeat", "1")
    write_html(tmp_path / "report.html", result)
    read = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert {"speed-up", "times"} <= {*read.ids}
    (record,) = result["reliability"]
    assert (record["run"], record["drafter"]) == ("lookup", "lookup")
    drafts = sum(one["count"] for one in record["bins"])
    gaps = sum(one["count"] * abs(one["chance"] - one["kept"]) for one in record["bins"])
    assert not drafts or record["error"] == pytest.approx(gaps / drafts)
    for row in result["runs"]:
        assert f"{row['tokens_per_second']:,.1f}" in read.words


def test_cards_are_in_two_columns_of_about_the_same_height():
    panels = [[cards.Panel("", height)] for height in (500, 300, 300, 400, 200, 700)]
    columns = cards.in_columns([cards.Card(str(index), "", "", panel) for index, panel in enumerate(panels)])
    assert sorted(index for column in columns for index, _ in column) == [*range(6)]
    assert columns[0][0][0] == 0
    heights = [sum(card.height for _, card in column) for column in columns]
    assert abs(heights[0] - heights[1]) == 0  # 500 + 300 + 400 and 300 + 200 + 700
    assert cards.in_columns([]) == []


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.01234, "0.0123"), (0.999, "0.999"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234")]
)
def test_numbers_have_three_digits(value, text):
    assert values.digits(value) == text


# -- what comes from elsewhere --


def test_everything_of_the_results_is_escaped():
    attack = "</style><script>alert('$1^{')</script>\"><img src=x onerror=alert(2)> 日本語 {{ 7 * 7 }}"
    plain = html_page(example())
    read = Page(html_page(attacked(example(), attack)))
    for tag in ("script", "img", "style"):
        assert read.tags.count(tag) == Page(plain).tags.count(tag), tag
    assert "onerror=alert(2)>" in read.words
    assert "49" not in read.words


def attacked(value, attack):
    """The same results with `attack` in every text; the names of runs still differ, and plain decoding keeps its name."""
    if isinstance(value, dict):
        return {name if name.isidentifier() and name != "stories" else attack: attacked(one, attack) for name, one in value.items()}
    if isinstance(value, list):
        return [attacked(one, attack) for one in value]
    return attack + value if isinstance(value, str) and value != "plain" else value


@pytest.mark.usefixtures("not_drawn")
def test_results_are_not_changed():
    result = example()
    before = copy.deepcopy(result)
    html_page(result)
    assert result == before


# -- errors --


def test_a_path_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    check_html(tmp_path / "report.html")
    with pytest.raises(ValueError, match="is a folder"):
        check_html(tmp_path)
    with pytest.raises(ValueError, match="which is no folder"):
        check_html(tmp_path / "missing" / "report.html")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="may not be written"):
        check_html(tmp_path / "report.html")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
@pytest.mark.usefixtures("not_drawn")
def test_a_full_disk_is_one_sentence():
    with pytest.raises(ValueError, match="/dev/full cannot be written: No space left on device"):
        write_html(Path("/dev/full"), example())


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_a_missing_library_is_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"--html needs {name}, .* pip install 'headstart\[report\]'"):
        check_html(tmp_path / "report.html")


# -- training curves --


def test_the_training_curve_is_read_from_the_log_of_the_heads(tmp_path):
    lines = [
        {"step": 10, "tokens": 500, "loss": 2.0, "tau": 1.25, "top1": [0.25]},
        {"step": 12, "held_out_loss": 1.5, "held_out_tau": 1.5},
        {"step": "13", "tau": 2.0},
        {"step": 14, "tokens": 700, "text": "nothing of the curve"},
    ]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 20, "tok')
    first, second = trained_heads.training_curve(tmp_path)
    assert first == {"step": 10, "tokens": 500, "loss": 2.0, "tau": 1.25}
    assert second == {"step": 12, "tokens": 600, "held_out_loss": 1.5, "held_out_tau": 1.5}
    assert trained_heads.training_curve(tmp_path / "missing") == []


def test_a_long_log_is_thinned(tmp_path):
    lines = (json.dumps({"step": step, "tokens": step, "tau": 1.0}) for step in range(1, 1001))
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    curve = trained_heads.training_curve(tmp_path)
    assert 100 <= len(curve) <= trained_heads.MAX_POINTS
    assert curve[0]["step"] == 1
