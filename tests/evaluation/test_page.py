"""The leaderboard's page: what it says, that it escapes everything, and how a browser shows it."""

import re
import shutil
from html.parser import HTMLParser

import pytest

from fish_speech.audio_decoding import audio_info
from fish_speech.evaluation.leaderboard import (
    Estimate,
    EvalSample,
    Leaderboard,
    ModelRow,
    Recommendation,
    SampleResult,
)
from fish_speech.evaluation.page import write_markdown, write_page
from fish_speech.preparation.report import write_report
from fish_speech.preparation.summary import Summary
from tests.chromium import Chromium
from tests.evaluation.conftest import CLIPS, text_of

EVIL = "</script><img src=x onerror='pwned=1'>\"'<script>pwned=1</script>"


def figures(wer, similarity, loss=None):
    made = {
        "wer": Estimate(wer, wer / 2, wer + 0.1, 4),
        "similarity": Estimate(similarity, similarity - 0.02, similarity + 0.02, 4),
        "runaways": Estimate(0.0, 0.0, 0.0, 4),
    }
    return made | ({"held_out_loss": Estimate(loss, loss - 0.1, loss + 0.1, 4)} if loss else {})


def planted(folder, models=None, clips=CLIPS[:2], texts=None, verdict="use", choice="step_2"):
    """A leaderboard whose models say what the recordings say; step_3 failed."""
    models = models or {"base": figures(0.3, 0.6, 5.0), "step_1": figures(0.5, 0.7, 4.0),
                        "step_2": figures(0.2, 0.8, 3.0)}  # fmt: skip
    rows = [
        ModelRow(name, step, f"{name}.ckpt", figures=f)
        for step, (name, f) in enumerate(models.items())
    ]
    rows.append(ModelRow("step_3", 3, "step_3.ckpt", error="step_3.ckpt: damaged"))
    samples = []
    for index, clip in enumerate(clips):
        for referenced in (False, True):
            name = f"{index:04d}{'-reference' * referenced}"
            spoken = {}
            for model in models:
                audio = f"audio/{model}/{name}.flac"
                (folder / audio).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(clip, folder / audio)
                spoken[model] = SampleResult(audio, 0.25, 0.1, 0.7, text_of(clip).lower())
            words = texts[index] if texts else text_of(clip)
            samples.append(EvalSample(name, words, referenced, str(clip), spoken))
    return Leaderboard(
        title="me",
        recogniser="ears 1.0",
        normalisation="lower case",
        speaker_encoder="nose 2.0",
        settings={"samples": 2, "seed": 0},
        recommendation=Recommendation(choice, 2, verdict, f"{choice} is better than base", "do it"),
        rows=rows,
        scale=[ModelRow("recording", figures={"wer": Estimate(0.05, 0.01, 0.1, 4)}),
               ModelRow("another speaker", figures={"similarity": Estimate(0.5, 0.4, 0.6, 4)})],
        samples=samples,
    )  # fmt: skip


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag, **wanted):
        return [a for t, a in self.tags if t == tag and wanted.items() <= a.items()]


def page_of(board, folder, **more):
    return Page(write_page(board, folder, **more).read_text(encoding="utf-8"))


def rows_of(html):
    return [re.sub("<[^>]+>", " ", row) for row in re.findall("<tr.*?</tr>", html, re.DOTALL)]


def test_the_recommendation_and_the_table_say_what_was_measured(tmp_path):
    html = write_page(planted(tmp_path), tmp_path).read_text(encoding="utf-8")
    assert html.index("<h1>Use step 2</h1>") < html.index("<table")
    assert "Step 2 is better than base." in html
    assert "<code>do it</code>" in html
    heads, base, first, best, failed, recording, another = rows_of(html)[:7]
    assert "Held-out loss" in heads
    assert "Training loss" not in heads  # nobody has one
    assert re.search(r"base\s+30%\s+15 to 40%\s+0.60\s+0.58 to 0.62", base)
    assert "recommended" in best
    assert "recommended" not in base + first
    assert "step 3" in failed
    assert "could not be measured: step_3.ckpt: damaged" in failed
    assert re.search(r"recording\s+5%", recording)
    assert re.search(r"another speaker\s+–\s+0.50", another)
    assert "ears 1.0" in html
    assert "nose 2.0" in html


@pytest.mark.parametrize(
    ("verdict", "choice", "said"),
    [
        ("keep the base", "base", "Keep the base"),
        ("keep the base", "A: x", "Keep A: x"),
        ("train longer", None, "Train longer"),
    ],
)
def test_nothing_is_marked_where_nothing_is_recommended(tmp_path, verdict, choice, said):
    html = write_page(planted(tmp_path, verdict=verdict, choice=choice), tmp_path).read_text()
    assert f"<h1>{said}</h1>" in html
    assert "★" not in html


def test_the_page_holds_all_that_it_shows(tmp_path):
    page = page_of(planted(tmp_path), tmp_path)
    assert len(page.all("button", type="button", **{"aria-pressed": "false"})) == 4 * 4 + 1
    # The recordings are played in two rows and are in the page once.
    sources = [a["src"] for a in page.all("audio")]
    assert len(sources) == 2 + 4 * 3
    assert len({a["id"] for a in page.all("audio")}) == len(sources)
    everything = [a[name] for _, a in page.tags for name in ("src", "href") if name in a]
    assert all(address.startswith("data:") for address in everything)
    assert {a["data-sound"] for a in page.all("button") if "data-sound" in a} == {
        a["id"] for a in page.all("audio")
    }


def test_everything_is_escaped(tmp_path):
    models = {EVIL: figures(0.3, 0.6)}
    board = planted(tmp_path, {"base": figures(0.3, 0.6)}, texts=[EVIL, "x\udcff"])
    harmless = {tag for tag, _ in page_of(board, tmp_path).tags}
    scripts = len(page_of(board, tmp_path).all("script"))
    board.rows += [
        ModelRow(EVIL, None, EVIL, figures=models[EVIL]),
        ModelRow(EVIL, None, EVIL, error=EVIL),
    ]
    board.scale.append(ModelRow(EVIL, figures=models[EVIL]))
    board.title = board.recogniser = board.normalisation = board.speaker_encoder = EVIL
    board.recommendation = Recommendation(EVIL, None, "use", EVIL, EVIL)
    for sample in board.samples:
        sample.spoken[EVIL] = SampleResult("audio/base/0000.flac", 0.1, heard=f"some {EVIL}")
        sample.spoken["base"].heard = EVIL
    page = page_of(board, tmp_path)
    assert {tag for tag, _ in page.tags} <= harmless | {"ins", "del"}
    assert len(page.all("script")) == scripts == 1
    assert page.text.count(EVIL) >= 8
    said = write_markdown(board, tmp_path).read_text(encoding="utf-8")
    outside = said.replace(f"```bash\n{EVIL}\n```", "")
    assert not re.search(r"(?<!\\)<", outside)


def test_what_was_heard_shows_what_is_wrong(tmp_path):
    board = planted(tmp_path, texts=["The ferry leaves at ten past.", "Hello."])
    board.samples[0].spoken["base"].heard = "the fairy leaves ten past now"
    board.samples[1].spoken["base"].heard = ""
    board.samples[2].spoken["base"] = SampleResult(None, 1.0, heard="", empty=True)
    board.samples[3].spoken["base"].runaway = True
    html = write_page(board, tmp_path).read_text(encoding="utf-8")
    assert (
        "the <del>ferry</del> <ins>fairy</ins> leaves <del>at</del> ten past <ins>now</ins>" in html
    )
    assert "nothing</p>" in html
    assert "<span class='flag'>says nothing</span>" in html
    assert "<span class='flag'>runs on</span>" in html
    assert "25% · 0.70" in html


def test_longer_speech_is_shown_longer(tmp_path):
    board = planted(tmp_path, clips=CLIPS[:1])
    longer = max(CLIPS, key=lambda clip: audio_info(clip).duration)
    shutil.copy(longer, tmp_path / board.samples[0].spoken["base"].audio)
    html = write_page(board, tmp_path).read_text(encoding="utf-8")
    share = audio_info(CLIPS[0]).duration / audio_info(longer).duration
    shares = [float(found) for found in re.findall(r"--share:([\d.]+)", html)][:4]
    assert shares == pytest.approx([share, 1, share, share], abs=0.001)


def test_a_page_that_would_be_too_large_links_to_the_files(tmp_path):
    board = planted(tmp_path)
    whole = page_of(board, tmp_path)
    sizes = [len(a["src"]) for a in whole.all("audio")]
    page = page_of(board, tmp_path, max_audio_bytes=sum(sizes) * 10 // 14 + 100)
    kept = [a["data-sound"] for a in page.all("button") if "data-sound" in a]
    assert len(kept) == 4 + 4 + 4  # recordings, base, recommended
    links = [a["href"] for a in page.all("a")]
    assert links == [f"audio/step_1/{sample.name}.flac" for sample in board.samples]
    assert "which else would be too large: 4 samples." in page.text


def test_a_file_that_is_missing_or_damaged_is_not_the_end(tmp_path):
    board = planted(tmp_path)
    (tmp_path / board.samples[0].spoken["base"].audio).unlink()
    (tmp_path / board.samples[1].spoken["base"].audio).write_bytes(b"no sound")
    board.samples[2].recording = str(tmp_path / "gone.wav")
    page = page_of(board, tmp_path)
    assert page.text.count("can't be read") == 3
    assert len(page.all("audio")) == 2 + 4 * 3 - 2


def test_a_single_sample_is_not_said_to_be_certain(tmp_path):
    board = planted(tmp_path, {"base": {"wer": Estimate(0.3, 0.3, 0.3, 1)}}, clips=[])
    assert "<b>30%</b><small>one sample</small>" in write_page(board, tmp_path).read_text()
    assert "30% (one sample)" in write_markdown(board, tmp_path).read_text()


def test_the_curves_go_where_the_figures_are(tmp_path):
    html = write_page(planted(tmp_path), tmp_path).read_text(encoding="utf-8")
    charts = re.findall("<figure.*?</figure>", html, re.DOTALL)
    assert [re.search("<b>(.*?)</b>", chart)[1] for chart in charts] == [
        "Word errors", "Similarity", "Loss"
    ]  # fmt: skip
    words = re.search("<polyline points='(.*?)'", charts[0])[1].split()
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in words)
    assert x1 - x0 == pytest.approx(x2 - x1)  # steps 0, 1, 2
    assert y1 < y0 < y2  # 50%, 30%, 20%, downwards
    band = re.search("class='band' points='(.*?)'", charts[0])[1].split()
    assert float(band[0].split(",")[1]) < y0 < float(band[-1].split(",")[1])
    anchor = re.search(r"class='anchor'><path d='M\d+ ([\d.]+)H", charts[0])[1]
    assert float(anchor) > y2  # recordings have fewer errors
    assert "another speaker" in charts[1]
    assert "step 1: 0.70 (0.68 to 0.72)" in charts[1]


def test_without_steps_models_stand_side_by_side(tmp_path):
    board = planted(tmp_path, {"one": figures(0.3, 0.6), "other <b>": figures(0.2, 0.7)})
    for row in board.rows:
        row.step = None
    chart = re.findall("<figure.*?</figure>", write_page(board, tmp_path).read_text())[0]
    assert "polyline" not in chart
    assert chart.count("class='whisker'") == 2
    assert ">one</text>" in chart
    assert ">other &lt;b&gt;</text>" in chart
    assert "training steps" not in chart


def test_a_leaderboard_with_next_to_nothing_in_it_is_a_page_too(tmp_path):
    nothing = Recommendation(None, None, "keep the base", "", "")
    board = Leaderboard("t", None, "", None, {}, nothing, [ModelRow("base", 0, error="no memory")])
    page = page_of(board, tmp_path)
    assert "could not be measured: no memory" in page.text
    assert "No recogniser understands these texts" in page.text
    assert not page.all("audio")
    assert "could not be measured: no memory" in write_markdown(board, tmp_path).read_text()


def test_the_table_in_markdown(tmp_path):
    board = planted(tmp_path)
    board.rows[0].name = "ba|se"
    lines = write_markdown(board, tmp_path).read_text(encoding="utf-8").splitlines()
    assert lines[:7] == [
        "## me: use step 2", "", "Step 2 is better than base.", "", "```bash", "do it", "```"
    ]  # fmt: skip
    table = [line for line in lines if line.startswith("|")]
    assert table[0] == ("|  | Word errors | Similarity (cosine) | Runs on | Held-out loss (nats) |")
    assert table[2].startswith(r"| ba\|se | 30% (15 to 40%) | 0.60 (0.58 to 0.62) | 0% (0 to 0%) |")
    assert table[4].startswith("| **step 2** ★ | 20% (10 to 30%) |")
    assert "could not be measured: step\\_3.ckpt: damaged" in table[5]
    assert table[6] == "| *recording* | 5% (1 to 10%) |  |  |  |"
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1


# In a browser


@pytest.fixture(scope="module")
def browser():
    with Chromium() as browser:
        yield browser


@pytest.fixture
def shown(browser, tmp_path):
    browser.look(1280, 900)
    browser.open(write_page(planted(tmp_path), tmp_path))
    return browser


NAMES = "[...document.querySelectorAll('.figures tbody:first-of-type th')].map(th => th.innerText)"
SORTED = "[...document.querySelectorAll('.figures thead th')].map(th => th.ariaSort)"


def names(browser):
    return [name.split()[-1] if "★" not in name else name.split()[1] for name in browser.run(NAMES)]


@pytest.mark.slow
def test_every_player_plays_and_nothing_is_fetched(shown, tmp_path):
    durations = shown.run("""(async () => {
        const found = [];
        for (const button of document.querySelectorAll('.play')) {
            button.click();
            await new Promise((done, fail) => {
                sound.oncanplaythrough = done;
                sound.onerror = () => fail(button.ariaLabel);
                if (sound.readyState === 4) done();
            });
            found.push([sound.duration, button.ariaPressed,
                document.querySelectorAll('[aria-pressed=true]').length]);
        }
        return found;
    })()""")
    wanted = [audio_info(clip).duration for clip in CLIPS[:2] for _ in range(8)]
    assert [duration for duration, _, _ in durations] == pytest.approx(wanted, abs=0.1)
    assert all(state == "true" and count == 1 for _, state, count in durations)
    images = shown.run("[...document.images].map(image => image.naturalWidth * image.complete)")
    assert len(images) == 16
    assert min(images) > 40
    assert {url.split(":")[0] for url in shown.requests} == {"file", "data"}
    assert [url for url in shown.requests if url.startswith("file")] == [
        (tmp_path / "leaderboard.html").as_uri()
    ]
    assert shown.complaints == []


@pytest.mark.slow
def test_speech_is_heard_to_its_end_and_then_the_player_rests(shown):
    assert shown.run("""(async () => {
        const button = document.querySelector('.play');
        button.click();
        await new Promise(done => sound.addEventListener('playing', done, {once: true}));
        sound.currentTime = sound.duration - 0.05;
        await new Promise(done => sound.addEventListener('ended', done, {once: true}));
        return [button.ariaPressed, getComputedStyle(button).getPropertyValue('--at') !== ''];
    })()""") == ["false", True]
    assert shown.run("""(() => {
        const button = document.querySelector('.play');
        button.click();
        button.click();
        return [sound.paused, button.ariaPressed];
    })()""") == [True, "false"]


@pytest.mark.slow
def test_sorting_by_columns_with_what_has_no_figure_last(shown):
    assert names(shown) == ["base", "1", "2", "3"]

    def click(column):
        shown.run(f"document.querySelectorAll('.figures thead button')[{column}].click()")
        return names(shown)

    assert click(1) == ["2", "base", "1", "3"]  # word errors, the fewest first
    assert shown.run(SORTED) == ["none", "ascending", "none", "none", "none"]
    assert click(1) == ["1", "base", "2", "3"]
    assert click(2) == ["2", "1", "base", "3"]  # similarity, the most alike first
    assert shown.run(SORTED) == ["none", "none", "descending", "none", "none"]
    assert click(0) == ["base", "1", "2", "3"]
    scale = "document.querySelector('.anchors').innerText"
    assert shown.run(f"{scale}.indexOf('recording') < {scale}.indexOf('another speaker')")


@pytest.mark.slow
def test_the_keyboard_reaches_everything(shown):
    focus = "document.activeElement.ariaLabel ?? document.activeElement.innerText"
    shown.run("document.querySelector('.figures thead button').focus()")
    shown.press("Tab")
    shown.press("Enter")
    assert names(shown) == ["2", "base", "1", "3"]
    shown.run("document.querySelector('.play').focus()")
    shown.press(" ")
    assert shown.run("playing === document.activeElement")
    shown.press("ArrowRight")
    assert shown.run(focus).startswith("Play base: ")
    shown.press("ArrowDown")
    assert shown.run("document.activeElement.closest('tr').className") == "cloned"
    shown.press("ArrowLeft")
    shown.press("ArrowUp")
    shown.press("ArrowUp")
    shown.press("ArrowLeft")
    assert shown.run("document.activeElement === document.querySelector('.play')")
    shown.press("Escape")
    assert shown.run("playing === null && sound.paused")


@pytest.mark.slow
def test_rows_are_chosen_and_what_was_heard_is_opened(shown):
    visible = "[...document.querySelectorAll('.samples tbody tr')].map(tr => +!!tr.offsetParent)"
    for choice, rows in {"plain": [1, 0, 1, 0], "cloned": [0, 1, 0, 1], "all": [1] * 4}.items():
        shown.run(f"document.getElementById('{choice}').click()")
        assert shown.run(visible) == rows
    opened = "[...document.querySelectorAll('details')].filter(details => details.open).length"
    shown.run("document.getElementById('all-heard').click()")
    assert shown.run(opened) == 12
    shown.run("document.getElementById('all-heard').click()")
    assert shown.run(opened) == 0


@pytest.mark.slow
def test_nothing_that_a_text_smuggles_in_runs(browser, tmp_path):
    board = planted(tmp_path, texts=[EVIL, EVIL])
    path = write_page(board, tmp_path)
    browser.open(path)
    assert browser.run("typeof pwned") == "undefined"
    assert browser.complaints == []
    # And if something were not escaped, the policy would still forbid it.
    path.write_text(
        path.read_text().replace(
            "<main>",
            "<main><script>pwned=1</script><img src='http://127.0.0.1:9/' onerror='pwned=1'>",
        )
    )
    browser.open(path)
    assert browser.run("typeof pwned") == "undefined"
    assert len(browser.complaints) >= 2
    assert browser.run("sound.paused")  # while the page's own script runs


@pytest.mark.slow
def test_on_a_phone_the_page_is_as_wide_as_the_screen_and_dark_where_asked(browser, tmp_path):
    path = write_page(planted(tmp_path), tmp_path)
    back = "getComputedStyle(document.body).backgroundColor"
    found = set()
    for dark in (False, True):
        browser.look(390, 844, dark=dark)
        browser.open(path)
        assert browser.run("document.documentElement.scrollWidth") == 390
        players = "[...document.querySelectorAll('.play')].map(b => b.getBoundingClientRect())"
        assert browser.run(f"{players}.every(box => box.width > 120 && box.right < 390)")
        found.add(browser.run(back))
    assert len(found) == 2


@pytest.mark.slow
def test_the_report_of_a_data_set_plays_what_lies_beside_it(browser, tmp_path):
    shutil.copy(CLIPS[0], tmp_path / "a.flac")
    clip = {"file": "a.flac", "speaker": "me", "text": "x", "source": "a", "start": 0.0, "end": 1.0,
            "duration": 1.0, "loudness": -23.0, "flags": []}  # fmt: skip
    browser.open(write_report(Summary([clip], [], [], []), tmp_path))
    duration = browser.run("""(async () => {
        const audio = document.querySelector('audio');
        audio.load();
        audio.play();
        await new Promise((done, fail) => { audio.oncanplay = done; audio.onerror = fail; });
        return audio.duration;
    })()""")
    assert duration == pytest.approx(audio_info(CLIPS[0]).duration, abs=0.01)
    assert browser.complaints == []
