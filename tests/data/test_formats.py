"""What a file holds is told by its content, and every row of it is a text or is left out with a reason."""

import gzip
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostile import corpora
from melayer.data.corpus import Corpus, Document
from melayer.data.entries import MAX_BYTES, BadRowError, entries
from melayer.data.formats import format_of
from melayer.data.texts import read_texts
from melayer.errors import InputError, MelayerError, collected


def texts_of(path, **options):
    """The texts of a file, and what is said beside them."""
    with collected() as said:
        return read_texts(path, **options), said


@pytest.mark.parametrize("name", corpora.TEXTS)
def test_hostile_texts(name, tmp_path):
    """The same reader for a file and for a corpus: all that is good in it, or one sentence."""
    path = corpora.TEXTS[name](tmp_path)
    good = corpora.GOOD[name]
    if good:
        texts, said = texts_of(path)
        assert len(texts) == good
        corpus = Corpus(str(path))
        corpus.check()
        found = list(corpus.documents())
        assert [item.text for item in found if isinstance(item, Document)] == texts
        if len(found) > good:
            rows = "1 row is" if len(found) == good + 1 else f"{len(found) - good} rows are"
            assert said[-1].startswith(f"{rows} left out of ")
        assert len(texts_of(path, limit=1)[0]) == 1
    else:
        for read in (lambda: read_texts(path), lambda: Corpus(str(path)).check()):
            with pytest.raises(InputError) as refused:
                read()
            sentence = str(refused.value)
            assert len(sentence) < 900
            assert "\n" not in sentence
            sentence.encode("utf-8")


@pytest.mark.parametrize("name", ["json_lines_called_txt", "json_lines_without_a_suffix", "json_list_of_objects"])
def test_json_is_not_measured_as_text(name, tmp_path):
    path = corpora.TEXTS[name](tmp_path)
    texts, (said,) = texts_of(path)
    assert texts == corpora.texts()
    column = "content" if "suffix" in name else "text"
    kind = "a JSON list" if "list" in name else "JSON lines"
    assert said == f"{path.name} is read as {kind}, its texts from the column '{column}'."


def test_the_column_is_named_or_the_usual_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "b", "mine": "m"}\n')
    assert texts_of(path) == (["b"], ["a.jsonl is read as JSON lines, its texts from the column 'body'."])
    assert texts_of(path, column="mine")[0] == ["m"]
    with pytest.raises(InputError, match=r"has the columns body, mine, not 'other'. Name .*: --column NAME"):
        read_texts(path, column="other")
    path.write_text("b\n")
    with pytest.raises(InputError, match=r"is text and has no columns, so there is no column 'mine'"):
        read_texts(path, column="mine")


def test_a_line_ends_at_a_line_feed_alone(tmp_path):
    path = tmp_path / "a.txt"
    odd = "\u2028 \u2029 \x85 \x0c \x0b \x1c \x1d \x1e \r x"
    path.write_bytes(f"a{odd}\r\nb{odd}\n\nc{odd}".encode())
    assert texts_of(path)[0] == [f"{letter}{odd}" for letter in "abc"]
    path.write_bytes("\n".join(json.dumps({"text": f"a{odd}"}, ensure_ascii=False) for _ in range(3)).encode())
    assert texts_of(path)[0] == [f"a{odd}"] * 3
    path.write_bytes(b"one\rtwo")
    assert texts_of(path) == (
        ["one\rtwo"], ["a.txt has carriage returns and no line feed, so it is one text: a line ends at a line feed."]
    )  # fmt: skip


def test_marks_between_files_that_were_put_together(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\xef\xbb\xbf{"text": "two"}\n')
    assert texts_of(path)[0] == ["one", "two"]


def test_what_a_file_is_may_come_late_in_it(tmp_path):
    path = tmp_path / "a"
    for encoding in ("utf-8", "utf-16"):
        path.write_bytes((" \n" * 100_000 + '{"text": "one"}\n').encode(encoding))
        texts, said = texts_of(path)
        assert texts == ["one"]
        assert said[0].startswith("a is read as JSON lines")
    path.write_bytes(b" \n" * 100_000)
    with pytest.raises(InputError, match="is empty"):
        read_texts(path)


def test_a_corpus_without_a_name_is_none():
    with pytest.raises(InputError, match="The corpus has an empty name"):
        Corpus("").check()


def test_a_table_is_known_by_its_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,kind\r\n"one, two\nthree",a\r\nfour\r\nfive,b,c\r\n')
    texts, said = texts_of(path)
    assert texts == ["one, two\nthree", "four"]
    assert said[-1] == "1 row is left out of a.csv: a.csv, line 5: 3 fields under 2 columns."
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(gzip.compress(b"text\tkind\none, two\ta\n"))
    assert texts_of(path)[0] == ["one, two"]


def test_a_row_that_is_too_long_is_left_out_and_those_around_it_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr("melayer.data.entries.MAX_BYTES", 100)
    path = tmp_path / "a.txt"
    for size in range(98, 104):
        path.write_text(f"before\n{'x' * size}\nafter")
        texts, said = texts_of(path)
        assert texts[0] == "before"
        assert texts[-1] == "after"
        assert (len(texts) == 3) == (size <= 100), size
        assert (said == []) == (size <= 100)
    assert said == ["1 row is left out of a.txt: a.txt, line 2: it is longer than 100 bytes."]
    with pytest.raises(InputError, match="line 1: it is longer than 100 bytes"):
        read_texts(path, whole=True)
    assert MAX_BYTES == 64 * 2**20


def test_a_broken_element_of_a_list_costs_no_other(tmp_path):
    path = tmp_path / "a.json"
    deep = "[" * 100_000 + "]" * 100_000
    huge = "1" * 5_000
    path.write_text(
        f'[{{"text": "one"}}, {deep}, {{"n": {huge}, "t": "]"}}, {{"text": "\\ud800"}}, nul, {{"text": "two"}}]'
    )
    texts, said = texts_of(path)
    assert texts == ["one", "two"]
    assert said[-1] == (
        "4 rows are left out of a.json: a.json, element 2: no JSON: it is nested too deeply; a.json, element 3: it has "
        "an integer of more than 4,300 digits; a.json, element 4: its text holds U+D800 at character 0, half of a "
        "surrogate pair; and 1 more."
    )
    path.write_text('[{"text": "one"}] and more')
    with pytest.raises(InputError, match="begins as a JSON list, but goes on behind its end"):
        read_texts(path)


def test_what_needs_a_library_that_is_not_there_says_which(tmp_path, monkeypatch):
    for name in ("parquet", "zstandard"):
        directory = tmp_path / name
        directory.mkdir()
        path = corpora.TEXTS[name](directory)
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "pyarrow", None)
            for read in (lambda path=path: read_texts(path), lambda path=path: Corpus(str(path)).check()):
                with pytest.raises(
                    InputError, match=r"needs pyarrow, .* not installed. .* pip install 'melayer\[data\]'"
                ):
                    read()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs datasets, .* not installed. .* pip install 'melayer\[data\]'"):
        Corpus("owner/name").check()
    # gzip is Python's own.
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert len(read_texts(corpora.TEXTS["gzip_called_txt"](tmp_path))) == 4


def test_the_advice_on_encodings_works(tmp_path):
    import shutil
    import subprocess

    if shutil.which("iconv") is None:
        pytest.skip("iconv is not installed")
    for name, encoding in (("utf16_le_without_a_mark", "UTF-16LE"), ("utf16_be_without_a_mark", "UTF-16BE")):
        path = corpora.TEXTS[name](tmp_path)
        with pytest.raises(InputError, match=f"Convert it to UTF-8 first: iconv -f {encoding} -t UTF-8"):
            read_texts(path)
        done = subprocess.run(["iconv", "-f", encoding, "-t", "UTF-8", str(path)], capture_output=True, check=True)
        path.write_bytes(done.stdout)
        assert len(read_texts(path)) == 4


# --- anything at all --------------------------------------------------------------------------------------------------

words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n"), min_size=1, max_size=20)
good_texts = words.filter(lambda text: text.strip() and not text.endswith("\r"))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("any")


@given(content=st.binary(max_size=400), name=st.sampled_from(["a.txt", "a.jsonl", "a.csv", "a.parquet", "a.gz"]))
def test_any_bytes_end_in_texts_or_in_our_error(place, content, name):
    path = place / name
    path.write_bytes(content)
    try:
        texts, _ = texts_of(path)
    except MelayerError as error:
        str(error).encode("utf-8")
        return
    assert texts
    for text in texts:
        assert text.strip()
        text.encode("utf-8")


@given(good=st.lists(good_texts, min_size=1, max_size=4), bad=st.lists(json_values, max_size=4), data=st.data())
def test_no_good_row_of_json_lines_is_lost(place, good, bad, data):
    rows = [({"text": text}, text) for text in good]
    for value in bad:
        text = value.get("text") if isinstance(value, dict) else None
        usable = isinstance(text, str) and text.strip() and text.isprintable()
        rows.insert(data.draw(st.integers(0, len(rows))), (value, text if usable else None))
    if sum(isinstance(value, dict) for value, _ in rows) * 2 < len(rows):
        return  # then it is no file of objects
    path = place / "rows"
    path.write_text("".join(json.dumps(value) + "\n" for value, _ in rows))
    texts, _ = texts_of(path)
    assert [text for text in texts if text in good] == [text for _, text in rows if text in good]


@given(good=st.lists(good_texts, min_size=1, max_size=4), bad=st.lists(json_values, max_size=4))
def test_no_good_element_of_a_json_list_is_lost(place, good, bad):
    path = place / "list"
    rows = [{"text": good[0]}, *bad, *({"text": text} for text in good[1:])]
    path.write_text(json.dumps(rows, indent=1))
    texts, _ = texts_of(path)
    left = iter(texts)
    assert all(text in left for text in good)  # in order


@given(lines=st.lists(good_texts, min_size=3, max_size=6), bad=st.binary(min_size=1, max_size=20))
def test_no_good_line_of_text_is_lost(place, lines, bad):
    path = place / "lines"
    content = "\n".join(lines).encode() + b"\n" + bad.replace(b"\n", b"")
    path.write_bytes(content)
    try:
        kind = format_of(path)
    except InputError:  # the mark of another kind of file was drawn, or the beginning of JSON
        return
    if kind is None or kind.kind != "text" or kind.encoding.mark:
        return
    texts, _ = texts_of(path)
    assert texts[: len(lines)] == lines


@given(st.binary(max_size=300))
def test_any_table_gives_rows_or_our_error(place, content):
    path = place / "table.csv"
    path.write_bytes(b"text,kind\n" + content + b"\ngood,row\n")
    try:
        format = format_of(path)
        assert format is not None
        values = []
        for entry in entries(path, format):
            try:
                values.append(entry.value())
            except BadRowError:
                continue
    except MelayerError:
        return
    quoted = b'"' in content
    assert quoted or {"text": "good", "kind": "row"} in values
