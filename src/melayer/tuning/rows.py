"""One row of training data in the shape that a trainer takes: turns or strings, a pair, a problem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from melayer.data.chat import render
from melayer.data.documents import require_characters
from melayer.data.entries import BadRowError
from melayer.data.tokens import Affixes
from melayer.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Method = Literal["sft", "dpo", "grpo"]
Row = dict[str, Any]

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_MAX_GOLD = 1000  # characters of an answer that can be checked
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(eq=False)
class Shape:
    """How the rows of a run are shaped."""

    method: Method
    tokenizer: PreTrainedTokenizerBase
    chat: bool
    system: str | None
    instruction: str
    vocabulary: int | None = None
    """How many tokens the model has; None: any."""
    notes: list[str] = field(default_factory=list)
    _marked: bool | None = None
    _affixes: Affixes | None = None
    _n_bos: int = 0

    def row(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> Row | None:
        """The row for the trainer; None where a part of it is empty.

        Raises:
            ValueError: It is malformed; the message says how.
        """
        parts = {role: row.get(column) for role, column in columns.items()}
        if any(_empty(value) for value in parts.values()):
            return None
        shaped = self._shaped(parts)
        if shaped is None:
            return None
        _require_characters(shaped)
        return {
            name: self._begun_once(value) if name in ("text", "prompt") and isinstance(value, str) else value
            for name, value in shaped.items()
        }

    @property
    def bos_note(self) -> str:
        """What is said where rows begin with what the tokenizer puts in front of them; empty where none does."""
        if not self._n_bos:
            return ""
        return (
            f"{self._n_bos} rows bring the begin-of-sequence token themselves, as a chat template writes it: the "
            "trainer does not get it twice."
        )

    def _begun_once(self, text: str) -> str:
        """A text without the beginning that the tokenizer puts in front of it anyway."""
        if self._affixes is None:
            self._affixes = Affixes.of(self.tokenizer)
        front = list(self._affixes.front)
        beginning = "".join(map(str, self.tokenizer.convert_ids_to_tokens(front))) if front else ""
        if not beginning or not text.startswith(beginning):
            return text
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not self._affixes.brought(ids):
            return text
        self._n_bos += 1
        rest = text[len(beginning) :]
        # Some tokenizers put a space in front, too.
        spaced = rest.removeprefix(" ")
        return spaced if list(self.tokenizer(spaced)["input_ids"])[: len(ids)] == ids else rest

    def _shaped(self, parts: dict[str, Any]) -> Row | None:
        if self.method == "sft":
            if "messages" in parts:
                return self._chat_row(_messages(parts["messages"]))
            if "text" in parts:
                return {"text": _string(parts["text"], "text")}
            return self._ends(self._prompt(parts["prompt"]), {"completion": parts["response"]})
        if self.method == "dpo":
            return self._pair(parts)
        gold = str(parts["answer"])
        # GSM8K's solutions end in their answer.
        gold = gold.rpartition("####")[2].strip() if "####" in gold else gold.strip()
        if len(gold) > _MAX_GOLD:
            raise ValueError(f"its answer has {len(gold):,} characters; expected at most {_MAX_GOLD:,}")
        from melayer.tuning.rewards import is_gold

        if not is_gold(gold):
            return None
        return {"prompt": self._prompt(parts["prompt"], self.instruction), "gold": gold}

    def _chat_row(self, turns: list[Row]) -> Row:
        if turns[-1]["role"] != "assistant":
            raise ValueError("the last message is not the assistant's")
        if not self.chat:
            raise ValueError("messages need a tokenizer with a chat template")
        if self._marks_answers():
            return {"messages": turns}
        note = "The chat template does not mark the assistant's turns, so the loss is on the last one of each chat."
        if note not in self.notes and sum(turn["role"] == "assistant" for turn in turns) > 1:
            self.notes.append(note)
        if len(turns) < 2:
            raise ValueError("there is no message before the assistant's")
        return {"prompt": turns[:-1], "completion": turns[-1:]}

    def _marks_answers(self) -> bool:
        """Whether the template, or TRL's own for it, tells the assistant's tokens from the others."""
        if self._marked is None:
            from melayer.tuning.trl_internals import marks_answers

            self._marked = marks_answers(self.tokenizer)
        return self._marked

    def _pair(self, parts: Row) -> Row | None:
        chosen, rejected = parts["chosen"], parts["rejected"]
        if "prompt" in parts:
            prompt = self._prompt(parts["prompt"])
            # Some sets repeat the prompt's turns in front of both answers.
            ends = {name: _after(prompt, parts[name]) for name in ("chosen", "rejected")}
            return self._ends(prompt, ends)
        if isinstance(chosen, str) and _HUMAN in f"\n\n{chosen.lstrip()}":
            chosen, rejected = _dialogue(chosen), _dialogue(_string(rejected, "rejected"))
        elif isinstance(chosen, str):
            raise ValueError("chosen is a string without a prompt column, and no dialogue of Human: and Assistant:")
        else:
            chosen, rejected = _messages(chosen), _messages(rejected)
        if chosen[:-1] != rejected[:-1]:
            # Where the dialogues part earlier than in the last turn, what they share is the prompt.
            shared = 0
            while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
                shared += 1
            if shared == 0 or len(chosen) != shared + 1 or len(rejected) != shared + 1:
                raise ValueError("chosen and rejected do not share everything but their last turn")
        prompt = chosen[:-1]
        if not prompt or _empty(chosen[-1]["content"]) or _empty(rejected[-1]["content"]):
            return None
        if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
            raise ValueError("the last turn of chosen or rejected is not the assistant's")
        if self.chat:
            return {"prompt": prompt, "chosen": chosen[-1:], "rejected": rejected[-1:]}
        text = "".join(f"{_HUMAN if turn['role'] == 'user' else _ASSISTANT} {turn['content']}" for turn in prompt)
        return {
            "prompt": f"{text.lstrip()}{_ASSISTANT}",
            "chosen": f" {chosen[-1]['content']}",
            "rejected": f" {rejected[-1]['content']}",
        }

    def _prompt(self, value: Any, instruction: str = "") -> Any:
        if not isinstance(value, str):
            if not self.chat:
                raise ValueError("messages need a tokenizer with a chat template")
            turns = _messages(value)
            if instruction:
                last = turns[-1]
                turns = [*turns[:-1], {**last, "content": f"{last['content']}\n\n{instruction}"}]
            return turns
        text = f"{value}\n\n{instruction}" if instruction else value
        if not self.chat:
            return text
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*before, {"role": "user", "content": text}]

    def _ends(self, prompt: Any, ends: Row) -> Row:
        """The prompt with its answers, all messages or all strings."""
        row: Row = {"prompt": prompt}
        for name, value in ends.items():
            if isinstance(value, str):
                # Without a template the answer begins on a line of its own, unless the texts say otherwise.
                apart = isinstance(prompt, str) and not prompt[-1].isspace() and not value[0].isspace()
                row[name] = [{"role": "assistant", "content": value}] if self.chat else f"{chr(10) * apart}{value}"
            else:
                if not self.chat:
                    raise ValueError("messages need a tokenizer with a chat template")
                row[name] = _messages(value)
        return row

    def n_tokens(self, row: Row) -> int:
        """Tokens of the row's longest text, prompt included."""
        if "text" in row:
            return self._length(row["text"])
        if "messages" in row:
            return self._length(row["messages"])
        ends = [row[name] for name in ("completion", "chosen", "rejected") if name in row]
        return max((self._length(row["prompt"] + end) for end in ends), default=0) or self._length(row["prompt"])

    def _length(self, value: Any) -> int:
        if isinstance(value, str):
            return self._known(self.tokenizer(value)["input_ids"]) + 1  # the end of text
        try:
            text = render(self.tokenizer, value, add_generation_prompt=value[-1]["role"] != "assistant")
        except InputError as error:  # the template refuses this conversation, and perhaps no other
            raise BadRowError(str(error).rstrip(".")) from error
        return self._known(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _known(self, ids: list[int]) -> int:
        """How many tokens these are, all of which the model has."""
        if self.vocabulary is not None and max(ids, default=0) >= self.vocabulary:
            raise ValueError(f"it has the token {max(ids)}, and the model has tokens 0 to {self.vocabulary - 1}")
        return len(ids)


def _require_characters(value: Any) -> None:
    """Raises ValueError where a text in a row cannot be written as UTF-8."""
    if isinstance(value, str):
        try:
            require_characters(value, "it")
        except BadRowError as error:
            raise ValueError(str(error)) from error
    elif isinstance(value, (list, tuple)):
        for item in value:
            _require_characters(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            _require_characters(item)


def _empty(value: Any) -> bool:
    if value is None:
        return True
    if isinstance(value, str):
        return not value.strip()
    return isinstance(value, (list, tuple)) and not len(value)


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is a {type(value).__name__} and not a string")
    return value


def _messages(value: Any) -> list[Row]:
    """Turns with role and content, also from the from/value form."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"expected a list of messages, found a {type(value).__name__}")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise ValueError(f"a message is a {type(turn).__name__}; expected an object with role and content")
        role = turn.get("role") or turn.get("from")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        if not isinstance(role, str) or role not in _ROLES or not isinstance(content, str):
            raise ValueError(f"a message has role {str(role)[:40]!r} and content of type {type(content).__name__}")
        turns.append({"role": _ROLES[role], "content": content})
    return turns


def _after(prompt: Any, answer: Any) -> Any:
    """The answer without the turns of the prompt, where it repeats them."""
    if isinstance(answer, str):
        return answer
    turns = _messages(answer)
    if isinstance(prompt, list) and len(turns) > 1:
        turns = turns[-1:]
    return turns


def _dialogue(text: str) -> list[Row]:
    """The turns of a text in which `Human:` and `Assistant:` begin paragraphs (HH-RLHF)."""
    turns: list[Row] = []
    rest = f"\n\n{text.strip()}"
    if not rest.startswith((_HUMAN, _ASSISTANT)):
        raise ValueError("a dialogue does not begin with Human: or Assistant:")
    while rest:
        mark, role = (_HUMAN, "user") if rest.startswith(_HUMAN) else (_ASSISTANT, "assistant")
        rest = rest[len(mark) :]
        ends = [at for at in (rest.find(_HUMAN), rest.find(_ASSISTANT)) if at >= 0]
        end = min(ends, default=len(rest))
        turns.append({"role": role, "content": rest[:end].strip()})
        rest = rest[end:]
    return turns
