"""Documents come in order, each with its place; what cannot be read is counted, named and skipped."""

import gzip
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from melayer.data.corpus import OTHER, Corpus, Document, LeftOut
from melayer.errors import InputError


def all_of(corpus: Corpus, **options):
    return list(corpus.documents(**options))


def rows(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def test_lines_of_a_text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\n  \ntwo\nthree")
    found = all_of(Corpus(str(path)))
    assert found == [Document(0, "one", ""), Document(1, "two", ""), Document(2, "three", "")]
    assert Corpus(str(path)).count() == 3
    assert all_of(Corpus(str(path)), mine=lambda index: index % 2 == 1) == [Document(1, "two", "")]
    assert all_of(Corpus(str(path)), stop=1) == [Document(0, "one", "")]
    (whole,) = all_of(Corpus(str(path), whole_file=True))
    assert whole.text.splitlines()[-1] == "three"


def compressed(suffix, content):
    return gzip.compress(content) if suffix == "gz" else pa.compress(content, codec="zstd", asbytes=True)


def test_compressed_is_the_same(tmp_path):
    for name, content in (("a.txt", b"one\ntwo\n"), ("a.jsonl", b'{"text": "one"}\n{"text": "two"}\n')):
        (tmp_path / name).write_bytes(content)
        for suffix in ("gz", "zst"):
            (tmp_path / f"{name}.{suffix}").write_bytes(compressed(suffix, content))
            assert all_of(Corpus(str(tmp_path / name))) == all_of(Corpus(str(tmp_path / f"{name}.{suffix}")))
    both = tmp_path / "both.txt.gz"  # as `cat` makes it
    both.write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two\n"))
    assert [item.text for item in all_of(Corpus(str(both)))] == ["one", "two"]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_that_is_cut_off(tmp_path, suffix):
    path = tmp_path / f"a.txt.{suffix}"
    path.write_bytes(compressed(suffix, "".join(f"line {n * n}\n" for n in range(5000)).encode())[:-20])
    with pytest.raises(InputError, match=r"cannot be read to its end: .*Copy or download it again"):
        all_of(Corpus(str(path)))


def test_bad_lines_are_named_and_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n{"text": \n{"text": "\xff"}\n[1]\n{"text": 3}\n{"text": " "}\n{"other": "x"}\n'
        b'{"text": "end"}'
    )
    found = all_of(Corpus(str(path)))
    assert [item.index for item in found] == list(range(8))
    reasons = [item.reason for item in found if isinstance(item, LeftOut)]
    assert [reason[:48] for reason in reasons] == [
        "a.jsonl, line 2: no JSON: Expecting value: line ", "a.jsonl, line 3: byte 10 (0xff) is not UTF-8",
        "a.jsonl, line 4: a list and no object with colum", "a.jsonl, line 5: its text is a number and no str",
        "a.jsonl, line 6: has no text", "a.jsonl, line 7: has the columns other, not one ",
    ]  # fmt: skip
    assert [item.text for item in found if isinstance(item, Document)] == ["good", "end"]


def test_columns_are_named_or_found(tmp_path):
    path = rows(tmp_path / "a.jsonl", {"body": "x", "kind": "k"}, {"body": "y", "kind": 2})
    assert all_of(Corpus(path)) == [Document(0, "x", ""), Document(1, "y", "")]
    assert [item.category for item in all_of(Corpus(path, category="kind"))] == ["k", "2"]
    with pytest.raises(InputError, match=r"has the columns body, kind, not 'words'. Name the .* text: --column NAME"):
        Corpus(path, column="words").check()
    with pytest.raises(InputError, match=r"has the columns body, kind, not 'topic'. Name the .* category, or leave"):
        Corpus(path, category="topic").check()
    other = rows(tmp_path / "b.jsonl", {"x": "1"})
    with pytest.raises(InputError, match=r"has the columns x, not one of text, content"):
        Corpus(other).check()
    assert [item.text for item in all_of(Corpus(other, column="x"))] == ["1"]
    (tmp_path / "c.txt").write_text("a\n")
    for option in ("category", "column"):
        with pytest.raises(InputError, match=rf"has no columns, so there is no {option} 'kind'"):
            Corpus(str(tmp_path / "c.txt"), **{option: "kind"}).check()


def test_only_what_is_text_is_one_document(tmp_path):
    for source in (table(tmp_path / "a.parquet"), "owner/name"):
        with pytest.raises(InputError, match=r"takes a text file as one document, and .* is none"):
            all_of(Corpus(source, whole_file=True))
    # As it stands, whatever it looks like: the way to measure JSON itself.
    assert all_of(Corpus(rows(tmp_path / "a.jsonl", {"text": "x"}), whole_file=True))[0].text == '{"text": "x"}\n'


def test_how_it_is_read_is_said(tmp_path):
    assert Corpus(rows(tmp_path / "a.jsonl", {"text": None}, {"content": "x"})).said == (
        "a.jsonl is read as JSON lines, its texts from the column 'content'."
    )
    (tmp_path / "a.txt").write_text("x\n")
    assert Corpus(str(tmp_path / "a.txt")).said == ""


def test_there_must_be_a_corpus(tmp_path):
    with pytest.raises(InputError, match=r"There is no corpus 'nothing': not a file here, and not a hub id"):
        Corpus("nothing").check()
    with pytest.raises(InputError, match=r"There is no corpus .*missing.txt"):
        Corpus(str(tmp_path / "missing.txt")).check()
    with pytest.raises(InputError, match=r"The directory .* holds no file. Give one with texts in it"):
        Corpus(str(tmp_path)).check()
    with pytest.raises(InputError, match=r"No file matches .*nothing\*.jsonl. Give another pattern"):
        Corpus(str(tmp_path / "nothing*.jsonl")).check()
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(InputError, match=r"The corpus .*a\* holds no document"):
        Corpus(str(tmp_path / "a*")).check()


def table(path, groups: int = 3, **columns):
    values = columns or {"text": [f"document {place}" for place in range(12)], "kind": ["a", "b"] * 6}
    parquet.write_table(pa.table(values), path, row_group_size=12 // groups, compression="none")
    return str(path)


def test_parquet(tmp_path):
    path = table(tmp_path / "a.parquet")
    found = all_of(Corpus(path, category="kind"))
    assert [item.text for item in found] == [f"document {place}" for place in range(12)]
    assert [item.category for item in found] == ["a", "b"] * 6
    assert Corpus(path).count() == 12
    assert [item.index for item in all_of(Corpus(path), mine=lambda index: index % 5 == 2, stop=8)] == [2, 7]
    with pytest.raises(InputError, match=r"has the columns text, kind, not 'words'"):
        Corpus(path, column="words").check()


def test_a_corrupt_row_group_is_skipped_and_the_rest_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    table(path)
    content = bytearray(path.read_bytes())
    group = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    start = group.dictionary_page_offset or group.data_page_offset
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    found = all_of(Corpus(str(path)))
    bad = [item for item in found if isinstance(item, LeftOut)]
    assert [item.index for item in bad] == [4, 5, 6, 7]
    assert bad[0].reason.startswith("a.parquet, row 5: row group 1 is corrupt: ")
    assert all("row group 1 is corrupt: " in item.reason for item in bad)
    assert [item.index for item in found if isinstance(item, Document)] == [0, 1, 2, 3, 8, 9, 10, 11]
    mine = all_of(Corpus(str(path)), mine=lambda index: index % 4 == 0)
    assert [(item.index, isinstance(item, LeftOut)) for item in mine] == [(0, False), (4, True), (8, False)]


def test_no_parquet_at_all(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 nothing of the kind")
    with pytest.raises(InputError, match=r"cannot be read as parquet: "):
        Corpus(str(path)).check()
    path.write_bytes(b"text, whatever its name")
    assert [item.text for item in all_of(Corpus(str(path)))] == ["text, whatever its name"]


def test_a_data_set_of_the_hub_is_streamed(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split, streaming, trust_remote_code):
        assert trust_remote_code is False
        asked.append((name, split, streaming))
        return iter([{"text": "one"}, {"text": None}, {"text": "three"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = all_of(Corpus("owner/name", split="test"))
    assert asked == [("owner/name", "test", True)]
    assert [item.index for item in found] == [0, 1, 2]
    assert isinstance(found[1], LeftOut)
    assert Corpus("owner/name").count() is None

    def refuse(*given, **options):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"cannot be had from the hub: no network. Check the spelling"):
        all_of(Corpus("owner/name"))


def test_a_stream_of_datasets_itself(tmp_path, monkeypatch):
    """Not the hub, which tests cannot reach, but what its client streams."""
    import datasets

    for shard in range(2):
        rows(
            tmp_path / f"{shard}.jsonl", *({"text": f"{shard} {place}", "kind": "ab"[place % 2]} for place in range(3))
        )
    original = datasets.load_dataset
    files = [str(tmp_path / f"{shard}.jsonl") for shard in range(2)]

    def of_files(name, split, streaming, trust_remote_code):
        assert (name, split) == ("owner/name", "test")
        return original("json", data_files={"test": files}, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", of_files)
    corpus = Corpus("owner/name", split="test", category="kind")
    texts = [f"{shard} {place}" for shard in range(2) for place in range(3)]
    assert [item.text for item in all_of(corpus)] == texts
    assert [item.category for item in all_of(corpus)] == list("abaaba")
    assert [item.index for item in all_of(corpus, mine=lambda index: index % 2 == 1, stop=5)] == [1, 3]
    unnamed = all_of(Corpus("owner/name", split="test", column="words"))
    assert unnamed[0] == LeftOut(0, "row 1: has the columns text, kind, not 'words'")
    (tmp_path / "1.jsonl").write_text('{"text": \n')
    with pytest.raises(
        InputError, match=r"owner/name cannot be read on from document 3: .* goes on from what was kept"
    ):
        all_of(corpus)


def test_many_files_are_one_corpus_in_the_order_of_their_names(tmp_path):
    directory = tmp_path / "shards"
    directory.mkdir()
    for shard in (1, 0, 2):
        rows(directory / f"{shard}.jsonl", *({"text": f"{shard} {place}"} for place in range(3)))
    texts = [f"{shard} {place}" for shard in range(3) for place in range(3)]
    for source in (directory, directory / "*.jsonl", tmp_path / "**" / "[012].jsonl"):
        corpus = Corpus(str(source))
        corpus.check()
        assert [item.text for item in all_of(corpus)] == texts
        assert [item.index for item in all_of(corpus)] == list(range(9))
        assert corpus.count() == 9
        for stop in range(10):
            assert [item.text for item in all_of(corpus, stop=stop)] == texts[:stop]
            odd = all_of(corpus, mine=lambda index: index % 2 == 1, stop=stop)
            assert [item.text for item in odd] == texts[1:stop:2]


def test_many_parquet_files_and_one_without_the_column(tmp_path):
    table(tmp_path / "0.parquet")
    table(tmp_path / "1.parquet", words=[f"more {place}" for place in range(12)])
    table(tmp_path / "2.parquet", text=[f"end {place}" for place in range(12)], other=["x"] * 12)
    corpus = Corpus(str(tmp_path))
    found = all_of(corpus)
    assert [item.index for item in found] == list(range(36))
    assert corpus.count() == 36
    assert found[12] == LeftOut(12, "1.parquet, row 1: has the columns words, not one of text, content, document, body")
    assert all(isinstance(item, LeftOut) for item in found[12:24])
    assert [item.text for item in found[24:]] == [f"end {place}" for place in range(12)]
    mine = all_of(corpus, mine=lambda index: index % 7 == 3, stop=30)
    assert [(item.index, isinstance(item, LeftOut)) for item in mine] == [
        (3, False), (10, False), (17, True), (24, False),
    ]  # fmt: skip
    (tmp_path / "3.parquet").write_bytes(b"PAR1 nothing of the kind")
    with pytest.raises(InputError, match=r"3.parquet cannot be read as parquet: "):
        Corpus(str(tmp_path)).check()


def test_rows_of_a_group_come_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("melayer.data.entries._ROWS", 3)
    path = table(tmp_path / "a.parquet", groups=1)
    assert [item.text for item in all_of(Corpus(path))] == [f"document {place}" for place in range(12)]
    assert [item.index for item in all_of(Corpus(path), mine=lambda index: index % 5 == 2, stop=8)] == [2, 7]


def test_a_directory_of_several_kinds_is_refused(tmp_path):
    rows(tmp_path / "a.jsonl", {"text": "x"})
    (tmp_path / "README.md").write_text("about it\n")
    (tmp_path / ".hidden").write_bytes(b"\0")
    with pytest.raises(InputError, match=r"holds files of several kinds \(JSON lines in a.jsonl, text in README.md\)"):
        Corpus(str(tmp_path)).check()
    assert [item.text for item in all_of(Corpus(str(tmp_path / "*.jsonl")))] == ["x"]


def test_each_text_file_of_a_directory_may_be_one_document(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(f"{name}\nand more\n")
    corpus = Corpus(str(tmp_path), whole_file=True)
    assert [item.text for item in all_of(corpus)] == ["a.txt\nand more\n", "b.txt\nand more\n"]
    assert corpus.count() == 2


def test_json_may_be_lines_or_a_list(tmp_path):
    path = tmp_path / "part-0.json.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert [item.text for item in all_of(Corpus(str(path)))] == ["one", "two"]
    (tmp_path / "a.json").write_text('[\n {"text": "one"}\n]\n')
    assert all_of(Corpus(str(tmp_path / "a.json"))) == [Document(0, "one", "")]
    (tmp_path / "b.json").write_text('{\n "text": "one"\n}\n')
    with pytest.raises(InputError, match=r"an object takes several lines; expected one a line, or a list"):
        Corpus(str(tmp_path / "b.json")).check()


# --- categories -----------------------------------------------------------------------------------------------------


def shares(path, size, **options):
    """The documents as so many processes get them, together in the order of the corpus."""
    found = []
    for rank in range(size):
        found += all_of(Corpus(path, **options), mine=lambda index, rank=rank: index % size == rank)
    return sorted(found, key=lambda item: item.index)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_which_categories_are_kept_apart_does_not_depend_on_whose_turn_they_are(tmp_path, kind):
    names = [f"k{(place * place) % 23}" for place in range(60)]
    path = str(tmp_path / f"a.{kind}")
    if kind == "jsonl":
        rows(tmp_path / "a.jsonl", *({"text": f"t{place}", "kind": name} for place, name in enumerate(names)))
    else:
        table(path, groups=12, text=[f"t{place}" for place in range(60)], kind=names)
    first = list(dict.fromkeys(names))
    for most in (1, 3, len(first), 64):
        own = first[:most]
        expected = [name if name in own else OTHER for name in names]
        for size in (1, 2, 3, 7):
            found = shares(path, size, category="kind", max_categories=most)
            assert [item.category for item in found] == expected
        # From the middle of the corpus on, as a scan that goes on.
        late = all_of(Corpus(path, category="kind", max_categories=most), mine=lambda index: index >= 40)
        assert [item.category for item in late] == expected[40:]


def test_a_category_is_a_name(tmp_path):
    path = tmp_path / "a.jsonl"
    kinds = ['"a\\ud800"', "null", "[1]", '{"a": 1}', "1e999", "2", "true", f'"{"x" * 300}"', '""']
    path.write_text("".join(f'{{"text": "x", "kind": {kind}}}\n' for kind in kinds))
    found = all_of(Corpus(str(path), category="kind"))
    assert [item.category if isinstance(item, Document) else item.reason[17:] for item in found] == [
        "its kind holds U+D800 at character 1, half of a surrogate pair", "", "its kind is a list, and no name",
        "its kind is an object, and no name", "inf", "2", "true",
        "its kind has 300 characters; expected at most 200", "",
    ]  # fmt: skip
