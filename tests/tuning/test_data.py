"""Rows in every form that a method takes, and every way in which they can be wrong."""

import gzip
import json

import pytest
from datasets import Dataset, load_dataset
from hypothesis import given
from hypothesis import strategies as st

import small_runs
import toys
from hostile import corpora
from melayer.errors import InputError
from melayer.tuning import data as training_data
from melayer.tuning import rows as training_rows
from melayer.tuning.data import RowOptions
from melayer.tuning.sources import source_of

PROMPT, ANSWER = "X w1 w2", "w3 w4"
USER, ASSISTANT = {"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}


@pytest.fixture(scope="module")
def plain():
    return toys.tokenizer()


@pytest.fixture(scope="module")
def chat():
    tokenizer = toys.tokenizer()
    tokenizer.chat_template = small_runs.TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def marking():
    """A tokenizer whose template says which tokens are the assistant's."""
    tokenizer = toys.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}w2 {% generation %}{{ m['content'] + ' </s> ' }}"
        "{% endgeneration %}{% else %}X w1 {{ m['content'] + ' </s> ' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}w2 {% endif %}"
    )
    return tokenizer


TOKENIZERS = [toys.tokenizer(), toys.tokenizer()]
TOKENIZERS[1].chat_template = small_runs.TEMPLATE


def prepare(method, data, tokenizer, *, max_length=None, seed=0, **options):
    return training_data.prepare(method, data, tokenizer, RowOptions(**options), max_length=max_length, seed=seed)


def one(method, row, tokenizer, **options):
    return prepare(method, [row], tokenizer, **options).rows[0]


# --- files ----------------------------------------------------------------------------------------------------------


def written(directory, kind, rows):
    path = directory / f"rows.{kind}"
    if kind in ("jsonl", "jsonl.gz"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        Dataset.from_list(rows).to_csv(path)
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "jsonl.gz"])
def test_every_kind_of_file(kind, plain, tmp_path):
    rows = small_runs.answers(5)
    path = written(tmp_path, kind, rows)
    source = source_of(path)
    assert [value() for _, value in source.rows(source.columns)] == rows
    # A file, a Dataset and a list of the same rows are the same.
    whole = [prepare("sft", data, plain) for data in (path, Dataset.from_list(rows), rows)]
    assert len({prepared.sha256 for prepared in whole}) == 1
    assert len(whole[0].rows) == 5


def test_files_that_are_none(tmp_path):
    def refused(name, content, match):
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        with pytest.raises(InputError, match=match):
            source_of(path)

    refused("missing.jsonl", None, "There is no file .*missing.jsonl. Give a file with training rows")
    refused("empty.jsonl", "", "empty.jsonl is empty. Give a file with at least one row")
    refused("rows.txt", "a", "rows.txt is not a file of rows but plain text; expected JSON lines, a JSON list, parquet")
    refused("broken.jsonl", '{"a": 1\n{"b"', "No row of .*broken.jsonl can be used; the first, line 1: no JSON: ")
    refused("broken.parquet", "PAR1", "broken.parquet cannot be read as parquet: ")
    with pytest.raises(InputError, match="cannot be read: it is a directory"):
        source_of(tmp_path)


def test_a_set_that_the_hub_does_not_give(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network here")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(InputError, match="owner/name is not a file here, and cannot be had from the hub: no network"):
        source_of("owner/name")
    assert load_dataset is not offline


# --- columns --------------------------------------------------------------------------------------------------------


def test_columns_are_found_by_their_usual_names(plain):
    for names in (("prompt", "completion"), ("question", "answer"), ("instruction", "output"), ("problem", "solution")):
        prepared = prepare("sft", [dict(zip(names, (PROMPT, ANSWER), strict=True))], plain)
        assert prepared.columns == {"prompt": names[0], "response": names[1]}
        assert prepared.rows[0] == {"prompt": PROMPT, "completion": f"\n{ANSWER}"}


def test_columns_that_are_not_there(plain):
    row = {"left": PROMPT, "right": ANSWER}
    with pytest.raises(
        InputError,
        match="the data has the columns left, right, but sft needs messages or prompt.response or text. Say which "
        "they are: --columns text=COLUMN",
    ):
        prepare("sft", [row], plain)
    with pytest.raises(InputError, match="but dpo needs chosen.rejected. Say which"):
        prepare("dpo", [row], plain)
    with pytest.raises(InputError, match="but grpo needs prompt.answer. Say which they are: --columns prompt=COLUMN"):
        prepare("grpo", [row], plain)
    with pytest.raises(InputError, match="--columns says prompt=lift, but the data has the columns left, right"):
        prepare("sft", [row], plain, columns={"prompt": "lift", "response": "right"})
    with pytest.raises(InputError, match="--columns names 'chosen'; for sft expected some of messages, prompt"):
        prepare("sft", [row], plain, columns={"chosen": "left"})
    both = {"question": PROMPT, "instruction": PROMPT, "answer": ANSWER}
    with pytest.raises(InputError, match="and question or instruction may be the prompt. Say which: --columns prompt="):
        prepare("sft", [both], plain)
    # The advice works.
    named = prepare("sft", [row], plain, columns={"prompt": "left", "response": "right"})
    assert named.rows[0]["completion"] == f"\n{ANSWER}"
    assert prepare("sft", [both], plain, columns={"prompt": "question"}).columns["prompt"] == "question"


# --- supervised -----------------------------------------------------------------------------------------------------


def test_strings_become_turns_where_there_is_a_template(plain, chat):
    row = {"prompt": PROMPT, "response": ANSWER}
    assert one("sft", row, chat) == {"prompt": [USER], "completion": [ASSISTANT]}
    assert one("sft", row, chat, chat=False) == {"prompt": PROMPT, "completion": f"\n{ANSWER}"}
    system = {"role": "system", "content": "w9"}
    assert one("sft", row, chat, system="w9")["prompt"] == [system, USER]
    assert one("sft", {"prompt": f"{PROMPT} ", "response": ANSWER}, plain)["completion"] == ANSWER
    with pytest.raises(InputError, match="has no chat template. Leave chat and the system prompt out"):
        prepare("sft", [row], plain, chat=True)
    with pytest.raises(InputError, match="A system prompt was given, but the prompts are not put into the chat"):
        prepare("sft", [row], chat, chat=False, system="w9")


def test_texts(plain):
    assert one("sft", {"text": PROMPT}, plain) == {"text": PROMPT}


def test_chats(plain, chat, marking):
    turns = [USER, ASSISTANT, USER, ASSISTANT]
    # Where the template marks the assistant's turns, the loss is on all of them; otherwise on the last.
    prepared = prepare("sft", [{"messages": turns}], marking)
    assert prepared.assistant_only
    assert prepared.rows[0] == {"messages": turns}
    prepared = prepare("sft", [{"messages": turns}], chat)
    assert not prepared.assistant_only
    assert prepared.rows[0] == {"prompt": turns[:-1], "completion": turns[-1:]}
    assert prepared.notes == (
        "The chat template does not mark the assistant's turns, so the loss is on the last one of each chat.",
    )
    foreign = [{"from": "human", "value": PROMPT}, {"from": "gpt", "value": ANSWER}]
    assert one("sft", {"conversations": foreign}, chat) == {"prompt": [USER], "completion": [ASSISTANT]}
    for messages, match in (
        ([USER], "No row of the data is left .* row 0, counted from 0: the last message is not the assistant's"),
        ([ASSISTANT], "there is no message before the assistant's"),
        ([{"role": "narrator", "content": "w1"}, ASSISTANT], "a message has role 'narrator'"),
        ("w1", "expected a list of messages, found a str"),
    ):
        with pytest.raises(InputError, match=match):
            prepare("sft", [{"messages": messages}], chat)
    with pytest.raises(InputError, match="messages need a tokenizer with a chat template"):
        prepare("sft", [{"messages": turns}], plain)


# --- preferences ----------------------------------------------------------------------------------------------------


def test_pairs_in_every_form(plain, chat):
    other = {"role": "assistant", "content": "w5"}
    expected = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [other]}
    strings = {"prompt": PROMPT, "chosen": ANSWER, "rejected": "w5"}
    assert one("dpo", strings, chat) == expected
    assert one("dpo", strings, plain) == {"prompt": PROMPT, "chosen": f"\n{ANSWER}", "rejected": "\nw5"}
    assert one("dpo", {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [other]}, chat) == expected
    # The prompt's turns in front of both answers, with and without a column for them.
    repeated = {"chosen": [USER, ASSISTANT], "rejected": [USER, other]}
    assert one("dpo", repeated, chat) == expected
    assert one("dpo", {"prompt": PROMPT, **repeated}, chat) == expected


def test_whole_dialogues(plain, chat):
    start = f"\n\nHuman: {PROMPT}\n\nAssistant: w7\n\nHuman: w8\n\nAssistant:"
    row = {"chosen": f"{start} {ANSWER}", "rejected": f"{start} w5\n\nw6"}
    prompt = [USER, {"role": "assistant", "content": "w7"}, {"role": "user", "content": "w8"}]
    found = one("dpo", row, chat)
    assert found["prompt"] == prompt
    assert found["chosen"] == [ASSISTANT]
    assert found["rejected"] == [{"role": "assistant", "content": "w5\n\nw6"}]
    found = one("dpo", row, plain)
    assert found["prompt"] + found["chosen"] == row["chosen"].lstrip()
    for chosen, match in (
        ("w1 w2", "a string without a prompt column, and no dialogue of Human: and Assistant:"),
        (f"\n\nHuman: other{start} {ANSWER}", "do not share everything but their last turn"),
    ):
        with pytest.raises(InputError, match=match):
            prepare("dpo", [{**row, "chosen": chosen}], chat)


# --- problems -------------------------------------------------------------------------------------------------------


def test_problems(plain, chat):
    row = {"question": PROMPT, "answer": "2 + 2 = <<2+2=4>>4\n#### 1,004"}
    asked = f"{PROMPT}\n\n{training_data.GRPO_INSTRUCTION}"
    assert one("grpo", row, chat) == {"prompt": [{"role": "user", "content": asked}], "gold": "1,004"}
    assert one("grpo", row, plain, instruction="") == {"prompt": PROMPT, "gold": "1,004"}
    turns = {"prompt": [{"role": "system", "content": "w9"}, USER], "answer": 4}
    found = one("grpo", turns, chat, instruction="w8")
    assert found["prompt"][1]["content"] == f"{PROMPT}\n\nw8"
    assert found["gold"] == "4"
    rows = [row, {"question": PROMPT, "answer": "w1 ####"}]
    prepared = prepare("grpo", rows, plain)
    assert len(prepared.rows) == 1
    assert prepared.notes == (
        "1 of 2 rows are empty, or have no answer that can be checked, (the first is row 1, counted from 0) and are "
        "left out.",
    )


# --- what is left out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", "  \n", None])
def test_empty_rows_are_counted_and_said(value, plain):
    rows = [*small_runs.answers(3), {"prompt": PROMPT, "response": value}, {"prompt": value, "response": ANSWER}]
    prepared = prepare("sft", rows, plain)
    assert len(prepared.rows) == 3
    assert prepared.left_out == {"empty": 2, "too_long": 0}
    assert prepared.notes == ("2 of 5 rows have an empty part (the first is row 3, counted from 0) and are left out.",)
    with pytest.raises(InputError, match="No row of the data is left to train on. 1 of 1 rows have an empty part"):
        prepare("sft", rows[3:4], plain)


def test_rows_that_are_too_long_are_counted_and_said_and_never_cut(plain, chat):
    rows = [{"prompt": "X w1", "response": "w2 w3"}, {"prompt": "X w1", "response": "w2 w3 w4"}]
    # Four words and the end of text.
    prepared = prepare("sft", rows, plain, max_length=5)
    assert prepared.rows.to_list() == [{"prompt": "X w1", "completion": "\nw2 w3"}]
    assert prepared.notes == (
        "1 of 2 rows have more than max_length = 5 tokens (the first is row 1, counted from 0) and are left out.",
    )
    assert len(prepare("sft", rows, plain, max_length=6).rows) == 2
    for method, long in (("dpo", small_runs.pairs(4)), ("grpo", small_runs.problems(4))):
        with pytest.raises(InputError, match="4 of 4 rows have more than max_length = 3 tokens"):
            prepare(method, long, chat, max_length=3)


def test_what_is_counted_is_what_the_trainer_sees(plain, chat, tmp_path):
    from melayer.tuning import config as training_config

    for tokenizer, templated in ((plain, False), (chat, True)):
        shape = training_rows.Shape("sft", tokenizer, templated, None, "")
        prepared = prepare("sft", small_runs.answers(6), tokenizer)
        config = training_config.resolve("sft", {}, out=tmp_path, seed=0, validates=False, max_positions=256)
        from trl import SFTTrainer

        trainer = SFTTrainer(
            model=small_runs.model(), args=config, train_dataset=prepared.rows, processing_class=tokenizer
        )
        seen = sorted(len(row["input_ids"]) for row in trainer.train_dataset)
        assert sorted(shape.n_tokens(row) for row in prepared.rows) == seen


# --- validation -----------------------------------------------------------------------------------------------------


def test_a_share_for_validation_is_the_same_each_time(plain, tmp_path):
    rows = small_runs.answers(20)
    first, again, other = (prepare("sft", rows, plain, validation=0.2, seed=seed) for seed in (0, 0, 1))
    assert (len(first.rows), len(first.validation)) == (16, 4)
    assert first.validation.to_list() == again.validation.to_list()
    assert first.sha256 == again.sha256
    assert first.validation.to_list() != other.validation.to_list()
    together = [*first.rows.to_list(), *first.validation.to_list()]
    assert sorted(map(str, together)) == sorted(map(str, prepare("sft", rows, plain).rows.to_list()))
    path = written(tmp_path, "jsonl", rows[:3])
    assert len(prepare("sft", rows, plain, validation=path).validation) == 3
    for share in (0.0, 1.0, 5.0):
        with pytest.raises(InputError, match="expected a share between 0 and 1"):
            prepare("sft", rows, plain, validation=share)


def test_only_the_first_rows(plain):
    assert len(prepare("sft", small_runs.answers(9), plain, limit=4).rows) == 4
    with pytest.raises(InputError, match="limit is 0; expected at least 1"):
        prepare("sft", small_runs.answers(9), plain, limit=0)


# --- rows that cannot be used -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", corpora.ROWS)
def test_hostile_rows_cost_themselves_alone(name, plain, chat, tmp_path):
    path = corpora.ROWS[name](tmp_path)
    good = corpora.GOOD[name]
    tokenizer = chat if "messages" in name else plain
    if not good:
        with pytest.raises(InputError, match=r"cannot be read: it is a|No row of .* is left to train on"):
            prepare("sft", path, tokenizer)
        return
    prepared = prepare("sft", path, tokenizer)
    assert len(prepared.rows) == good
    total = sum(prepared.left_out.values())
    assert bool(prepared.notes) == bool(total)


def test_a_row_that_is_malformed_is_left_out_counted_and_named(plain):
    rows = [*small_runs.answers(3), {"prompt": 3, "response": "w1"}, None, {"prompt": "w1 \ud800", "response": "w2"}]
    prepared = prepare("sft", rows, plain)
    assert len(prepared.rows) == 3
    assert prepared.left_out == {"empty": 0, "too_long": 0, "malformed": 3}
    assert prepared.notes == (
        "3 rows are left out of the data: row 3, counted from 0: messages need a tokenizer with a chat template; "
        "row 4, counted from 0: null and no object with columns; row 5, counted from 0: it holds U+D800 at character "
        "3, half of a surrogate pair.",
    )


def test_a_template_that_refuses_costs_the_row(plain):
    tokenizer = toys.tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    rows = [{"prompt": "w1", "response": "w2"}]
    assert len(prepare("sft", rows, tokenizer, max_length=9).rows) == 1
    with pytest.raises(
        InputError, match="No row of the data is left .* row 0, counted from 0: .*System role not supported"
    ):
        prepare("sft", rows, tokenizer, max_length=9, system="w3")


def test_a_token_beyond_the_embedding_costs_the_row(plain):
    tokenizer = toys.tokenizer()
    tokenizer.add_tokens(["beyond"])
    rows = [{"text": "w1 w2"}, {"text": "w1 beyond"}]
    prepared = training_data.prepare("sft", rows, tokenizer, RowOptions(), max_length=9, vocabulary=toys.VOCAB)
    assert len(prepared.rows) == 1
    assert "it has the token 64, and the model has tokens 0 to 63" in prepared.notes[0]


def test_bos_that_a_row_brings_reaches_the_trainer_once():
    tokenizer = toys.beginning_tokenizer()
    for row, part in (({"text": "<s> w4 w5"}, "text"), ({"prompt": "<s> w4 w5", "response": "w6"}, "prompt")):
        prepared = prepare("sft", [row, {name: value.removeprefix("<s> ") for name, value in row.items()}], tokenizer)
        own, plain = prepared.rows
        assert tokenizer(own[part])["input_ids"] == tokenizer(plain[part])["input_ids"] == [1, 7, 8]
        assert prepared.notes[0].startswith("1 rows bring the begin-of-sequence token themselves")
    twice = prepare("sft", [{"text": "<s> <s> w4"}], tokenizer).rows[0]
    assert tokenizer(twice["text"])["input_ids"] == [1, 1, 7]
    # A tokenizer that adds none gets what there is.
    assert one("sft", {"text": "<s> w4"}, toys.tokenizer()) == {"text": "<s> w4"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "a"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.lists(json_values | st.dictionaries(st.sampled_from(["prompt", "response"]), json_values), max_size=5), st.data()
)
def test_no_good_row_is_lost_whatever_stands_beside_it(others, data):
    good = small_runs.answers(2)
    rows = [good[0]]
    for other in [*others, good[1]]:
        rows.insert(data.draw(st.integers(0, len(rows))), other)
    for tokenizer in TOKENIZERS:
        prepared = prepare("sft", rows, tokenizer)
        kept = [str(row) for row in prepared.rows]
        assert all(str(one("sft", row, tokenizer)) in kept for row in good)
        assert len(prepared.rows) + sum(prepared.left_out.values()) == len(rows)
