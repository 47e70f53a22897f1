import json
import os
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import children
import melayer
import small_benchmarks
import toys
from melayer.errors import InputError
from melayer.evaluation.report import write_eval_report
from melayer.runs import jsonl
from melayer.studies.overview import write_report

EVIL = ["<script>alert(1)</script>", "</script>", "<b>bold</b>", "&lt;", "\"'>", "{{7*7}}"]


def evil_tokenizer() -> PreTrainedTokenizerFast:
    """Words that are markup; the massive token is a script."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: i + 3 for i, word in enumerate(EVIL[1:])} | {EVIL[0]: toys.X}
    vocab |= {f"w{i}": i for i in range(len(EVIL) + 2, toys.X)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<pad>")


@pytest.fixture(scope="module")
def evil_result():
    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)])
    text = " ".join([*EVIL[1:], EVIL[0], *(f"w{i}" for i in range(10, 30))])
    return melayer.locate(model, evil_tokenizer(), texts=[text, text], name="<img src=x onerror=alert(2)>")


@pytest.fixture(scope="module")
def evil_rest():
    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)])
    text = " ".join([*EVIL[1:], EVIL[0], *(f"w{i}" for i in range(10, 30))])
    given = {"texts": [text, text]}
    tokenizer = evil_tokenizer()
    return {
        "explain": melayer.explain(model, tokenizer, **given),
        "rigidity": melayer.rigidity(model, tokenizer, **given, n_first_tokens=9),
        "sinks": melayer.sinks(model, tokenizer, **given, T=16, epsilon=0.05),
        "sweep": melayer.sweep(model, tokenizer, **given, T=16, rates=[0.5, 1], selectors=["random"]),
    }


@pytest.fixture(scope="module")
def page(evil_result, evil_rest, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    return write_report(evil_result, out, **evil_rest, command="melayer report '<script>'").html


@pytest.fixture(scope="module")
def eval_page(tmp_path_factory):
    """An evaluation with a won and a lost item, whose stored answers are markup."""
    store = tmp_path_factory.mktemp("eval")
    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)])
    data = small_benchmarks.write(tmp_path_factory.mktemp("data"))
    benchmarks = melayer.load_tasks(["gsm8k", "wikitext2"], data=data, max_new_tokens=4)
    variants = {"plain": None, EVIL[0]: melayer.WeMask(rate=1, layers=range(4, 8))}
    asked = {"max_length": 512, "store": store}
    melayer.evaluate(model, toys.tokenizer(), benchmarks, variants, **asked)
    lines = jsonl.read(store / "eval.jsonl", "", "").values
    for line in lines[1:]:
        if (line["item"], line["variant"]) in {("gsm8k/0", EVIL[0]), ("gsm8k/1", "plain")}:
            line["output"] = EVIL[0]
            line["scores"]["exact_match,flexible-extract"] = [1.0, 1.0]
    jsonl.replace(store / "eval.jsonl", lines)
    result = melayer.evaluate(model, toys.tokenizer(), benchmarks, variants, **asked)
    return write_eval_report(result, tmp_path_factory.mktemp("report"), command="melayer eval '<script>'").html


def own_part(path: Path) -> str:
    """The page without plotly.js and our own script."""
    return re.sub(r"<script>.*?</script>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_text_from_models_and_users_is_escaped(page):
    html = own_part(page)
    assert "<script>alert" not in html
    assert "<img" not in html
    assert "<b>bold" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    figures = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, re.DOTALL).group(1)
    assert "<" not in figures
    json.loads(figures)


def test_the_page_opens_with_the_answer(evil_result, page):
    html = own_part(page)
    first = re.search(r'<p class="answer">(.*?)</p>', html, re.DOTALL).group(1)
    assert first.startswith("The ME layer is block 3 of 8 (0-based): there token 5")
    assert evil_result.model.fingerprint in html
    assert page.stat().st_size < 8_000_000


def test_where_the_figures_come_from(evil_result, tmp_path):
    written = write_report(evil_result, tmp_path, device="cuda:0", weights={"a.safetensors": "ab" * 32})
    html = own_part(written.html)
    assert f"<th>sha256 of a.safetensors</th><td>{'ab' * 32}</td>" in html
    assert "<td>float32, cuda:0</td>" in html
    assert "|h| &gt; 100 and |h| &gt; 1000 × median (Sun et al. 2024)" in html
    provenance = json.loads(written.json.read_text())["provenance"]
    assert (provenance["device"], provenance["weights_sha256"]) == ("cuda:0", {"a.safetensors": "ab" * 32})
    assert provenance["command"] is None


def test_results_of_another_model_are_refused(evil_rest, tmp_path):
    located = melayer.locate(toys.make("llama", seed=1), toys.tokenizer(), texts=[toys.text(20, x_at=None)])
    with pytest.raises(InputError, match="The SinksResult is of another model"):
        write_report(located, tmp_path, sinks=evil_rest["sinks"])
    assert not list(tmp_path.iterdir())


def test_what_was_not_measured_has_its_reason_in_place(evil_result, tmp_path):
    written = write_report(evil_result, tmp_path, not_measured={"sinks": "Because of <this>."})
    assert "<h2>What attention does with it</h2>" in own_part(written.html)
    assert json.loads(written.json.read_text())["not_measured"] == {"sinks": "Because of <this>."}
    assert "Not measured. Because of &lt;this&gt;." in own_part(written.html)


def test_the_json_holds_the_same_figures(evil_result, evil_rest, page):
    values = json.loads((page.parent / "report.json").read_text(encoding="utf-8"))
    assert values["locate"] == json.loads(json.dumps(evil_result.to_dict()))
    for key, result in evil_rest.items():
        assert values[key] == json.loads(json.dumps(result.to_dict()))
    assert values["provenance"]["command"] == "melayer report '<script>'"
    assert set(values["provenance"]["versions"]) >= {"melayer", "torch", "transformers"}


def test_nothing_massive_makes_a_page_too(tmp_path):
    result = melayer.locate(toys.make("llama"), toys.tokenizer(), texts=[toys.text(20, x_at=None)])
    html = own_part(write_report(result, tmp_path).html)
    assert "No massive activation was found" in html
    assert "No scalar meets the criterion" in html


def test_an_evaluation_shows_what_flipped(eval_page):
    html = own_part(eval_page)
    evil = "&lt;script&gt;alert(1)&lt;/script&gt;"
    assert f"gsm8k: 1 items won by {evil}" in html
    assert f"gsm8k: 1 items lost by {evil}" in html
    assert "Of 2 comparisons with plain, corrected for their number (Holm)" in html
    assert "wins 1, losses 1, ties 4: no difference shown" in html
    assert "<script>alert" not in html
    values = json.loads((eval_page.parent / "report.json").read_text())
    assert {change["task"] for change in values["evaluation"]["changes"]} == {"gsm8k", "wikitext2"}


# --- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    binary = next((p for p in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(p).exists()), None)
    if binary is None and not os.environ.get("CI"):
        pytest.skip("no Chromium on this machine; Debian's package is `chromium`")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--enable-unsafe-swiftshader"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=arguments)
        yield browser
        browser.close()


def opened(chromium, path, **options):
    context = chromium.new_context(offline=True, **options)
    context.set_default_timeout(1000 * children.PATIENCE)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: (problems.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on(
        "request",
        lambda r: None if r.url.startswith((path.as_uri(), "data:", "blob:")) else problems.append(r.url),
    )
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-drawn=yes]")
    return page, problems


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_plots_are_drawn_offline_and_without_errors(chromium, page, scheme, width):
    tab, problems = opened(chromium, page, color_scheme=scheme, viewport={"width": width, "height": 800})
    keys = json.loads(tab.locator("#figures").text_content()).keys()
    assert keys == {
        "magnitudes", "shares", "tokens", "surface", "explain-budget-3", "explain-neurons-3",
        "explain-counterfactuals-3", "rigidity-cosine", "rigidity-rank", "sinks-heads", "sinks-rate", "sinks-massive",
        "sweep-perplexity", "sweep-sinks", "sweep-both", "sweep-heads", "sweep-cosine",
    }  # fmt: skip
    for key in keys - {"surface"}:
        assert tab.locator(f"#plot-{key} .main-svg").count() > 0
        assert tab.locator(f"#plot-{key}").bounding_box()["height"] > 200
    assert tab.locator("#plot-magnitudes .scatterlayer path.js-line").count() == 3
    assert tab.locator("#plot-shares .barlayer .point").count() == 2 * toys.N_LAYERS
    assert tab.locator("#plot-tokens .heatmaplayer image").count() == 1
    assert tab.locator("#plot-surface canvas").count() > 0
    assert tab.locator("#plot-explain-neurons-3 .barlayer .point").count() == 10
    assert tab.locator("#plot-explain-budget-3 .waterfalllayer .point").count() >= 4
    assert tab.locator("#plot-rigidity-cosine .scatterlayer path.js-line").count() >= 3
    assert tab.locator("#plot-sinks-heads .heatmaplayer image").count() == 1
    assert tab.locator("#plot-sinks-rate .scatterlayer path.js-line").count() == 4
    # The switch: one trace is drawn, and another one after a click.
    assert tab.locator("#plot-sweep-heads .heatmaplayer image").count() == 1
    image = "#plot-sweep-heads .heatmaplayer image"
    before = tab.locator(image).get_attribute("href")
    tab.locator("#plot-sweep-heads .updatemenu-header").click()
    tab.locator("#plot-sweep-heads .updatemenu-dropdown-button").nth(2).click()
    tab.wait_for_function(
        "([image, before]) => ![null, undefined, before].includes(document.querySelector(image)?.getAttribute('href'))",
        arg=[image, before],
    )
    # The page itself never scrolls sideways; wide tables do so in their own box.
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    ink = tab.evaluate("getComputedStyle(document.querySelector('#plot-magnitudes .xtitle')).fill")
    assert ink == {"light": "rgb(28, 30, 33)", "dark": "rgb(231, 233, 236)"}[scheme]
    assert problems == []


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_an_evaluation_is_drawn(chromium, eval_page, width):
    tab, problems = opened(chromium, eval_page, viewport={"width": width, "height": 800})
    assert tab.locator("#plot-forest .scatterlayer .point").count() == 2
    assert tab.locator("#plot-forest .errorbar").count() == 2
    assert any("alert(1)" in label for label in tab.locator("#plot-forest .ytick text").all_text_contents())
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert tab.locator("details").count() == 2
    assert problems == []


@pytest.mark.browser
def test_a_token_that_is_a_script_stays_a_token(chromium, page):
    tab, problems = opened(chromium, page)
    labels = tab.locator("#plot-tokens .ytick text").all_text_contents()
    assert any("<script>alert(1)</script>" in label for label in labels), labels
    assert tab.locator("main img").count() == 0
    assert tab.locator("h1").text_content() == "<img src=x onerror=alert(2)>"
    assert problems == []


@pytest.mark.browser
def test_the_problem_listener_can_fail(chromium, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<body data-drawn=yes><img src='http://localhost:9/x.png'><script>undefined.x</script>")
    _, problems = opened(chromium, bad)
    assert any("localhost:9" in problem for problem in problems)
    assert any("undefined" in problem for problem in problems)


def test_the_page_of_a_sweep_over_the_built_in_texts_says_that_they_are(tmp_path):
    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)])
    with torch.no_grad():  # BOS becomes massive, whatever the text
        embedding = model.get_input_embeddings().weight
        embedding[:, toys.LISTEN] = 0.0
        embedding[1, toys.LISTEN] = 20.0
    options = {"bos": True, "rates": [0], "selectors": ["random"], "T": 16}
    result = melayer.sweep(model, toys.tokenizer(), **options)
    assert result.settings["texts"] == result.located.settings["texts"] == "built-in"
    written = melayer.write_report(result.located, tmp_path, sweep=result)
    assert "<td>built-in: 8 texts, " in written.html.read_text(encoding="utf-8")
