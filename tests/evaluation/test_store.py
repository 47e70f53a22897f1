"""What is kept of an evaluation, and for which settings: files made by hand, and processes that are not there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from damaged import damaged
from melayer.errors import InputError, MelayerError, OutputError
from melayer.evaluation.harness import Item
from melayer.evaluation.store import FILE, Store, file_of, key_of, order_of
from melayer.runs import jsonl
from melayer.runs.processes import Group
from stored_answers import MODEL, answer, metric, settings, write

ABOUT = settings({"t": {"m": metric()}}, ["plain"])


def kept(directory):
    return jsonl.read(directory / FILE, "", "").values


def items(n, task="t"):
    return {task: [Item(f"{task}/{place}", None, (), "", f"p{place}") for place in range(n)]}


class Second(Group):
    """The second of two processes, to which the first sends what it has."""

    def __init__(self, sent):
        super().__init__(1, 2)
        self.sent = sent

    def gather(self, values):
        return [*self.sent, *values]


def test_without_a_place_it_is_in_memory_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store.opened(None, ABOUT, Group())
    store.add([answer("t", "plain", 0)])
    store.finish(items(1), ["plain"])
    assert list(store.records) == [("t", "plain", "t/0")]
    assert list(tmp_path.iterdir()) == []


def test_answers_are_there_at_once_and_in_order_at_the_end(tmp_path):
    store = Store.opened(tmp_path / "new" / "place", ABOUT, Group())
    for place in (2, 0, 10, 1):
        store.add([answer("t", "plain", place)])
    assert [row["item"] for row in kept(tmp_path / "new" / "place")[1:]] == ["t/2", "t/0", "t/10", "t/1"]
    store.finish(items(3), ["plain"])
    # What was not asked this time comes last.
    assert [row["item"] for row in kept(tmp_path / "new" / "place")[1:]] == ["t/0", "t/1", "t/2", "t/10"]


def test_what_other_processes_left_is_taken_over(tmp_path):
    write(tmp_path, ABOUT, [answer("t", "plain", 0)])
    write(tmp_path, ABOUT, [answer("t", "plain", 1)], file="eval.rank1.jsonl")
    with (tmp_path / "eval.rank1.jsonl").open("a") as file:
        file.write('{"task": "t", "var')  # it was killed there
    store = Store.opened(tmp_path, ABOUT, Group())
    assert sorted(store.records) == [("t", "plain", "t/0"), ("t", "plain", "t/1")]
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert len(kept(tmp_path)) == 3


def test_a_process_beside_the_first_has_its_own_file(tmp_path):
    first = answer("t", "plain", 0)
    store = Store.opened(tmp_path, ABOUT, Second([first]))
    store.add([answer("t", "plain", 1)])
    assert [path.name for path in tmp_path.iterdir()] == ["eval.rank1.jsonl"]
    assert list(store.records) == [("t", "plain", "t/0"), ("t", "plain", "t/1")]
    store.finish(items(2), ["plain"])
    assert list(tmp_path.iterdir()) == []  # the first has written them


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"shared": {**ABOUT["shared"], "chat": True}}, "chat differs"),
        ({"shared": {**ABOUT["shared"], "chat": True, "system": "Be kind."}}, "chat, system differ"),
        ({"shared": {**ABOUT["shared"], "model": {**MODEL, "fingerprint": "1" * 16}}}, "model differs"),
        ({"tasks": {"t": {**ABOUT["tasks"]["t"], "limit": 3}}}, "task t differs"),
        ({"variants": {"plain": {"rate": 0.5}}}, "variant plain differs"),
    ],
)
def test_other_settings_are_refused(changed, said, tmp_path):
    write(tmp_path, ABOUT, [answer("t", "plain", 0)])
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(InputError, match=rf"eval.jsonl holds answers of another run: {said}\. Give another place"):
        Store.opened(tmp_path, {**ABOUT, **changed}, Group())
    assert (tmp_path / FILE).read_bytes() == before


def test_settings_that_fit(tmp_path):
    write(tmp_path, {**ABOUT, "variants": {"plain": None, "mask": {"rate": 0.5}}}, [answer("t", "mask", 0)])
    moved = {**ABOUT["shared"], "model": {**MODEL, "name": "elsewhere/toy"}}
    new = {**settings({"u": {"m": metric()}}, []), "shared": moved, "variants": {"mask": {"rate": 0.5, "new": None}}}
    store = Store.opened(tmp_path, new, Group())
    assert list(store.records) == [("t", "mask", "t/0")]
    # Tasks and variants that are not asked this time stay.
    assert list(store.settings["tasks"]) == ["t", "u"]
    assert list(store.settings["variants"]) == ["plain", "mask"]
    assert kept(tmp_path)[0]["eval_of"] == store.settings


def test_without_an_answer_nothing_can_be_mixed(tmp_path):
    write(tmp_path, {**ABOUT, "shared": {**ABOUT["shared"], "chat": True}}, [])
    assert Store.opened(tmp_path, ABOUT, Group()).records == {}
    assert kept(tmp_path) == [{"eval_of": ABOUT}]


def test_an_answer_to_another_question(tmp_path):
    write(tmp_path, ABOUT, [answer("t", "plain", 0), answer("t", "plain", 7)])
    store = Store.opened(tmp_path, ABOUT, Group())
    store.check(items(3))
    with pytest.raises(InputError, match="The stored answer to t/0 is to another question"):
        store.check({"t": [Item("t/0", None, (), "", "another")]})


NO_EVALUATION = [
    "a diary\n",
    '{"eval_of": {}}\n',
    '{"scan_of": {}}\n',
    '{"eval_of": 3}\n',
    "[]\n",
    "",
    '{"eval_of": {"shared": {"model": {}}, "tasks": {"t": {}}, "variants": {}}}\n',
]


@pytest.mark.parametrize("text", NO_EVALUATION)
def test_files_that_are_none(text, tmp_path):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(InputError, match="eval.jsonl holds no evaluation that can be read"):
        Store.read(tmp_path / FILE)


@pytest.mark.parametrize("file", [FILE, "eval.rank3.jsonl"])
@pytest.mark.parametrize("text", NO_EVALUATION)
def test_what_is_no_store_is_left_as_it_is(text, file, tmp_path):
    (tmp_path / file).write_text(text)
    with pytest.raises(MelayerError):
        Store.opened(tmp_path, ABOUT, Group())
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {file: text}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seconds": None}, "seconds: input should be a valid number"),
        ({"tokens": "3"}, "tokens: input should be a valid integer, and '3' stands there"),
        ({"item": "t"}, "item is 't'; expected a task and a place"),
        ({"task": "u"}, "its task 'u' is not among the settings"),
        ({"scores": {"m": 1}}, "m is 1; expected a value and a size"),
        ({"scores": {"m": [1, None]}}, r"m is \[1, None\]; expected a value and a size"),
        ({"crc33": "00000000"}, "it has fields that this version does not know"),
    ],
)
def test_an_answer_that_is_none(changed, said, tmp_path):
    row = {**answer("t", "plain", 0, m=[1, 1]), **changed}
    write(tmp_path, ABOUT, [row])
    before = (tmp_path / FILE).read_bytes()
    for read in (lambda: Store.read(tmp_path / FILE), lambda: Store.opened(tmp_path, ABOUT, Group())):
        with pytest.raises(InputError, match=f"holds no evaluation that can be read: line 2: {said}"):
            read()
    assert (tmp_path / FILE).read_bytes() == before
    del row["seconds"]
    write(tmp_path, ABOUT, [row])
    with pytest.raises(InputError, match="holds no evaluation that can be read"):
        Store.read(tmp_path / FILE)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stored")
    store = Store.opened(directory, ABOUT, Group())
    store.add([answer("t", "plain", place, m=[place % 2, 1]) for place in range(3)])
    return (directory / FILE).read_bytes(), store.records


@given(st.data())
def test_whatever_byte_is_changed_or_cut_no_answer_becomes_another(stored, tmp_path_factory, data):
    content, records = stored
    path = tmp_path_factory.getbasetemp() / "damaged.jsonl"
    path.write_bytes(damaged(content, data))
    try:
        found = Store.read(path)[1]
    except MelayerError:
        return
    assert found.items() <= records.items()


def test_places_that_are_none(tmp_path):
    with pytest.raises(InputError, match="There is no evaluation at .*: expected a directory with eval.jsonl, or such"):
        file_of(tmp_path)
    write(tmp_path, ABOUT, [])
    assert file_of(tmp_path) == file_of(tmp_path / FILE) == tmp_path / FILE
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OutputError, match="The answers cannot be kept in .*file.*: Not a directory. Give another place"
    ):
        Store.opened(tmp_path / "file" / "below", ABOUT, Group())


def test_order_is_by_place_and_not_by_text():
    assert sorted(["t/10", "t/9", "a_b/3"], key=order_of) == ["a_b/3", "t/9", "t/10"]
    assert key_of(answer("t", "plain", 3)) == ("t", "plain", "t/3")
