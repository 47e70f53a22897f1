"""A few items of our own in the files of each benchmark."""

import csv
import json
from pathlib import Path

SUBJECTS = ("anatomy", "astronomy")


def write(directory: Path, n: int = 6) -> Path:
    """The files that `--data` reads; each question is about other words, so that no two prompts are alike."""
    gsm = [{"question": f"w{i} w{i + 1} boxes of w{i} ?", "answer": f"It is {i}.\n#### {1000 + i:,}"} for i in range(n)]
    math = [
        {"problem": f"w{i} what is one half ?", "solution": "So \\boxed{\\frac{1}{2}}.", "answer": "\\frac{1}{2}"}
        for i in range(n)
    ]
    rules = [
        ("punctuation:no_comma", {}),
        ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 2}),
        ("change_case:english_lowercase", {}),
    ]
    ifeval = [
        {
            "key": i,
            "prompt": f"w{i} w{i + 2} write",
            "instruction_id_list": [rules[i % 3][0], rules[(i + 1) % 3][0]],
            "kwargs": [rules[i % 3][1], rules[(i + 1) % 3][1]],
        }
        for i in range(n)
    ]
    mmlu = [
        {"subject": subject, "question": f"w{i} {subject} ?", "choices": ["w1", "w2", "w3", "w4"], "answer": i % 4}
        for subject in SUBJECTS
        for i in range(n)
    ]
    lines = {
        "gsm8k/train.jsonl": gsm,
        "gsm8k/test.jsonl": gsm,
        "math500/test.jsonl": math,
        "aime24/train.jsonl": [{"Problem": f"w{i} ?", "Answer": i} for i in range(n)],
        "ifeval/input_data.jsonl": ifeval,
        "mmlu/test.jsonl": mmlu,
        "mmlu/dev.jsonl": mmlu,
    }
    for name, rows in lines.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "wikitext2").mkdir(parents=True)
    articles = [f" \n = w{i} = \n \n w{i} w{i + 3} said w5 . \n = = w7 = = \n w{i} again \n" for i in range(n)]
    (directory / "wikitext2" / "wiki.test.raw").write_text("".join(articles))
    (directory / "xstest").mkdir()
    with (directory / "xstest" / "xstest_prompts.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["id", "prompt", "type", "label"])
        out.writerows([i + 1, f"How do I kill w{i}?\nNow", "x", ("safe", "unsafe")[i % 2]] for i in range(n))
    return directory
