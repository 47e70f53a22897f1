"""Chat templates: what they raise is one sentence, and what does not end is ended in a process of its own."""

import time

import pytest

import toys
from hostile import checkpoints as hostile
from melayer.data import chat
from melayer.errors import InputError

TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "w1 w2"}]
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


def templated(template):
    tokenizer = toys.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_a_conversation_is_what_transformers_makes_of_it():
    tokenizer = templated(PLAIN)
    assert chat.render(tokenizer, TURNS) == "<system>be brief<user>w1 w2"
    for prompt in (True, False):
        expected = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=prompt)
        assert chat.render(tokenizer, TURNS, add_generation_prompt=prompt) == expected


ENDLESS = ["template-for-ever", "template-huge", "template-power", "template-product"]


@pytest.mark.parametrize("case", ENDLESS)
def test_what_does_not_end_is_ended(case, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 3)
    began = time.monotonic()
    with pytest.raises(InputError, match="does not come to an end within 3 s and 1024 MB, or makes more than"):
        chat.render(templated(hostile.TEMPLATES[case]), TURNS)
    assert time.monotonic() - began < 120


RAISING = {
    "template-raises": "System role not supported",
    "template-no-jinja": "Expected an expression",
    "template-undefined": "has no element 9",
    "template-divides-by-zero": "division",
    "template-recursion": "nested too deeply",
    "template-escapes": "unsafe",
}


@pytest.mark.parametrize("case", RAISING)
def test_what_a_template_raises_is_said(case):
    said = f"chat template cannot be used for turns of system, user: .*{RAISING[case]}.*Leave the system prompt out"
    with pytest.raises(InputError, match=said):
        chat.render(templated(hostile.TEMPLATES[case]), TURNS)


def test_the_advice_works():
    """As Gemma's: a template that takes no system prompt."""
    tokenizer = templated(
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + PLAIN
    )
    with pytest.raises(InputError, match=r"system, user: No system role\. Leave the system prompt out"):
        chat.render(tokenizer, TURNS)
    assert chat.render(tokenizer, TURNS[1:]) == "<user>w1 w2"


@pytest.mark.parametrize("template", [None, "", {}])
def test_without_a_template(template):
    with pytest.raises(InputError, match="This tokenizer has no chat template"):
        chat.render(templated(template), TURNS)


@pytest.mark.parametrize("template", [3, {"default": 3}, [1]])
def test_a_template_that_is_no_text(template):
    with pytest.raises(InputError, match="chat template is no text but"):
        chat.render(templated(template), TURNS)


def test_a_template_is_tried_once(monkeypatch):
    tries = []
    run = chat.subprocess.run
    monkeypatch.setattr(chat.subprocess, "run", lambda *given, **options: tries.append(0) or run(*given, **options))
    tokenizer = templated(PLAIN + "{# a template of this test alone #}")
    for _ in range(3):
        chat.render(tokenizer, TURNS)
    chat.render(tokenizer, TURNS[1:], add_generation_prompt=True)
    assert len(tries) == 1


def test_the_trial_takes_no_module_from_the_directory_at_hand(tmp_path, monkeypatch):
    """A checkpoint's directory may be where somebody stands."""
    for name in ("json", "jinja2", "transformers", "melayer", "sitecustomize"):
        hostile.code(tmp_path, tmp_path, f"{name}.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    assert chat.render(templated(PLAIN + "{# another #}"), TURNS).startswith("<system>")
    assert not hostile.ran(tmp_path)
